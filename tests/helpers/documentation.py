"""The pages of the documentation, as tests read them."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PROJECT = ROOT / "projects/DynamicDINO"
PAGES = sorted(
    path
    for path in [
        *ROOT.glob("*.md"),
        ROOT / "kernels/README.md",
        ROOT / "benchmarks/README.md",
        *PROJECT.glob("*.md"),
        *PROJECT.glob("datasets/*.md"),
        *PROJECT.glob("docs/**/*.md"),
        *PROJECT.glob("dynamic_dino/weights/*.md"),
    ]
)
BLOCK = re.compile(
    r"^(?:<!-- (?P<marker>not run: .+?) -->\n)?(?P<indent> *)```(?P<language>\w+)\n"
    r"(?P<code>.*?)^(?P=indent)```$",
    re.S | re.M,
)


class Block(NamedTuple):
    """A fenced block of a page; `marker`, the comment before it, says why it isn't run."""

    page: Path
    line: int
    language: str
    code: str
    marker: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            if match["language"] in languages:
                line = text[: match.start("code")].count("\n")
                found.append(Block(page, line, match["language"], match["code"], match["marker"]))
    return found


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^( *)```.*?^\1```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
