// The theme searches in a Worker, and browsers refuse one to a page opened from a folder. There its script runs in a hidden
// frame of the page instead. The offline plugin loads a stranger's script for this unless a polyfill has this file's name.
class FrameWorker extends EventTarget {
  constructor(url) {
    super();
    const frame = document.createElement("iframe");
    frame.hidden = true;
    this.scope = new Promise((resolve, reject) => {
      frame.addEventListener("load", () => {
        const scope = frame.contentWindow;
        scope.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", {data}));
        const script = scope.document.createElement("script");
        script.onload = () => resolve(scope);
        script.onerror = () => reject(new Error(`Cannot load ${url}`));
        script.src = new URL(url, location);
        scope.document.head.append(script);
      }, {once: true});
    });
    document.body.append(frame);
  }

  postMessage(data) {
    this.scope.then((scope) => scope.dispatchEvent(new scope.MessageEvent("message", {data})));
  }
}
if (location.protocol === "file:") window.Worker = FrameWorker;
