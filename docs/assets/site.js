// What axe-core found in the theme: tables that scroll out of reach of the keyboard, a search dialog without a name, and
// a landmark of navigation for each button that copies code.
// The theme wraps tables after the page is there, so the page is watched.
const repair = () => {
  document.querySelectorAll(".md-typeset__scrollwrap:not([tabindex])").forEach((region) => region.setAttribute("tabindex", "0"));
  document.querySelectorAll(".md-search[role=dialog]:not([aria-label])").forEach((dialog) => dialog.setAttribute("aria-label", "Search"));
  document.querySelectorAll(".md-code__nav:not([role])").forEach((nav) => nav.setAttribute("role", "none"));
};
new MutationObserver(repair).observe(document.body, {childList: true, subtree: true});
repair();
