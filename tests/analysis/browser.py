"""A headless browser that shows a page and says what it saw."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# Nothing is to be fetched, and a container's root can't have a sandbox.
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--enable-logging=stderr", "--window-size=1280,900"),
)
PROBE = """<script>addEventListener("load", () => parent.postMessage(JSON.stringify({
  images: [...document.images].map(i => ({alt: i.alt, width: i.naturalWidth})),
  headings: [...document.querySelectorAll("h3")].map(h => h.innerText),
  edges: [...document.querySelectorAll(".table, figure, .plot")].map(
    e => e.getBoundingClientRect().right),
  viewport: innerWidth, page: document.documentElement.scrollWidth,
}), "*"));</script></body>"""
FRAME = """<!DOCTYPE html><link rel="icon" href="data:,"><script>addEventListener("message", e => {
  document.title = e.data; });</script><iframe src="framed.html" width="WIDTH" height="800"
  style="border: 0"></iframe>"""


def find_browser() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def look_at(page: Path, width: int, folder: Path) -> tuple[dict, str]:
    """What the page looks like in a window of this width, and what it wrote to the console."""
    text = page.read_text(encoding="utf-8")
    assert text.count("</body>") == 1
    (folder / "framed.html").write_text(text.replace("</body>", PROBE), encoding="utf-8")
    (folder / "frame.html").write_text(FRAME.replace("WIDTH", str(width)))
    profile = f"--user-data-dir={folder / 'profile'}"
    address = (folder / "frame.html").as_uri()
    result = subprocess.run(
        [find_browser(), *OPTIONS, profile, "--virtual-time-budget=20000", "--dump-dom", address],
        capture_output=True,
        text=True,
        timeout=120,
    )
    [title] = re.findall(r"<title>(.*?)</title>", result.stdout, re.DOTALL)
    console = "\n".join(line for line in result.stderr.splitlines() if "CONSOLE" in line)
    return json.loads(html.unescape(title)), console
