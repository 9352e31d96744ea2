"""Makes the pictures of the docs from a finished run of the quickstart.

    python docs/make_pictures.py RUN_DIRECTORY      needs Chromium for the picture of the report

Each picture goes to docs/assets/. The run directory is only read.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

ASSETS = Path(__file__).parent / "assets"
PLOTS = ("stage_settings", "dev_rouge_l", "difficulty_teacher_student_kl", "frontier_draws")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT = 1120, 1054
"""Size of the part of the report that is shown, its top left corner first."""


def main(run: Path) -> str | None:
    """Write the pictures; return what is missing, in one line, or None."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        return f"none of {', '.join(BROWSERS)} is installed"
    missing = [path for path in _sources(run) if not path.exists()]
    if missing:
        return f"{missing[0]}: missing; give the directory of a finished run"
    with TemporaryDirectory() as scratch:
        shot = Path(scratch) / "report.png"
        size = f"--window-size={WIDTH},{HEIGHT}"
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", size, f"--screenshot={shot}"]
        subprocess.run([browser, *options, (run / "report.html").absolute().as_uri()], check=True, capture_output=True)
        for source, name in ((shot, "report"), *((path, path.stem) for path in _sources(run)[1:])):
            # A palette makes files a third as large; this method also keeps colours that few pixels have.
            picture = Image.open(source).convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE)
            picture.save(ASSETS / f"{name}.png", optimize=True)
    return None


def _sources(run: Path) -> list[Path]:
    return [run / "report.html", *(run / "plots" / f"{name}.png" for name in PLOTS)]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])) if len(sys.argv) == 2 else __doc__)
