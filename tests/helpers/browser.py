"""A headless browser that shows a page and says what it saw.

It is this machine's Chromium or Chrome. `BROWSER=1 make test` runs this file, which brings one into
the environment where there is none, without root: npm's package @sparticuz/chromium.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PACKAGE = "@sparticuz/chromium@147.0.0"
FOLDER = Path(sys.prefix) / "browser"
# Nothing is to be fetched, and a container's root can't have a sandbox.
OPTIONS = (
    *("--no-sandbox", "--no-zygote", "--disable-gpu", "--disable-quic", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
)
MEASURE = """() => ({
  images: [...document.images].map(i => ({alt: i.alt, width: i.naturalWidth})),
  edges: [...document.querySelectorAll(".table, figure, .plot")].map(
    e => e.getBoundingClientRect().right),
  page: document.documentElement.scrollWidth,
})"""


@dataclass
class Seen:
    """console: all messages and errors; images: alt and width of each; edges: right ends of
    figures and tables; page: the page's width. All in pixels."""

    console: list[str]
    images: list[dict]
    edges: list[float]
    page: int


def find_browser() -> Path | None:
    """A browser and playwright, which steers it."""
    if importlib.util.find_spec("playwright") is None:
        return None
    found = [path for name in NAMES if (path := shutil.which(name))]
    found += [path] if (path := FOLDER / "chromium").is_file() else []
    return Path(found[0]) if found else None


def look_at(page: Path, width: int) -> Seen:
    """What the page looks like in a window of this width."""
    with open_tab(page.as_uri(), width) as (tab, console):
        return Seen(console, **tab.evaluate(MEASURE))


@contextmanager
def open_tab(address: str, width: int) -> Iterator[tuple[Any, list[str]]]:
    """A page in a window of this width, to be clicked at, and what comes to its console."""
    from playwright.sync_api import sync_playwright

    browser, options, environment = find_browser(), list(OPTIONS), dict(os.environ)
    if browser.parent == FOLDER:  # it is made for machines that have nothing else
        options.append("--single-process")
        environment |= {"LD_LIBRARY_PATH": f"{FOLDER}/lib", "FONTCONFIG_PATH": str(FOLDER)}
    console: list[str] = []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=browser, args=options, env=environment
        )
        tab = chromium.new_page(viewport={"width": width, "height": 800})
        tab.set_default_timeout(120_000)  # on a busy machine
        tab.on("console", lambda message: console.append(message.text))
        tab.on("pageerror", lambda error: console.append(str(error)))
        tab.goto(address, wait_until="load")
        yield tab, console
        chromium.close()


def install() -> None:
    """Unpacks the package's browser, its libraries and a font.

    Raises:
        OSError: it can't be had here.
    """
    import brotli

    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise OSError("there is none for this kind of machine")
    npm = shutil.which("npm")
    if npm is None:
        raise OSError("npm, which would bring one, is missing too")
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run(
                [npm, "pack", "--silent", PACKAGE],
                cwd=folder,
                check=True,
                stdout=subprocess.DEVNULL,
                timeout=300,
            )
        except subprocess.SubprocessError as error:
            raise OSError(f"npm failed: {error}") from None
        [archive] = Path(folder).glob("*.tgz")
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
        parts = Path(folder) / "package/bin"
        new = Path(folder) / "browser"
        for part in parts.glob("*.tar.br"):  # lib/*.so, fonts/*, drawing without a GPU
            tar = Path(folder) / part.stem
            tar.write_bytes(brotli.decompress(part.read_bytes()))
            with tarfile.open(tar) as file:
                file.extractall(new, filter="data")
        fonts = new / "fonts.conf"
        fonts.write_text(fonts.read_text().replace("/var/task/fonts", f"{FOLDER}/fonts"))
        program = new / "chromium"
        program.write_bytes(brotli.decompress((parts / "chromium.br").read_bytes()))
        program.chmod(0o755)
        shutil.rmtree(FOLDER, ignore_errors=True)
        whole = shutil.copytree(new, f"{FOLDER}.part", dirs_exist_ok=True)
        Path(whole).rename(FOLDER)


if __name__ == "__main__":
    if find_browser() is None:
        print("No browser found: bringing one, for the tests of pages", file=sys.stderr)
        try:
            install()
        except OSError as error:
            print(f"The tests that need a browser will be skipped: {error}.", file=sys.stderr)
