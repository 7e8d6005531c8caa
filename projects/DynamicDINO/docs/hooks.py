"""What mkdocs calls while it builds the site: see `hooks` in mkdocs.yml.

The pages keep the links that work in the repository. Pages that lie outside of docs/ become pages
of the site too (`PAGES`); figures and other files that a page links to come along.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[3]
PROJECT = "projects/DynamicDINO"
# Page of the site -> file of the repository.
PAGES = {
    "index.md": "README.md",
    "project.md": f"{PROJECT}/README.md",
    "datasets.md": f"{PROJECT}/datasets/README.md",
    "model_cards.md": f"{PROJECT}/dynamic_dino/weights/README.md",
    "kernels.md": "kernels/README.md",
    "results.md": "benchmarks/RESULTS.md",
    "ablations.md": "benchmarks/ABLATIONS.md",
    "benchmarks.md": "benchmarks/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")  # [text](relative#anchor)
BLOCK = re.compile(r"[-*] |\d+\. |\||<!--")  # begins a list, a table or a comment


def on_files(files: Files, config) -> Files:
    for page, source in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config, files: Files) -> str:
    if page.file.src_uri.endswith(".ipynb"):
        return markdown
    here = Path(page.file.abs_src_path).parent
    pages = {(ROOT / source).resolve(): uri for uri, source in PAGES.items()}

    def moved(match: re.Match) -> str:
        text, link, anchor = match[1], match[2], match[3] or ""
        target = (here / link).resolve()
        uri = pages.get(target)
        if uri is None and target.is_relative_to(config.docs_dir):
            uri = target.relative_to(config.docs_dir).as_posix()
        if uri is None:
            if target.is_dir():
                return text  # the site has no listings of folders
            if not target.is_file():
                return match[0]  # mkdocs reports it
            uri = f"repository/{target.relative_to(ROOT).as_posix()}"
            if files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(target)))
        uri = os.path.relpath(uri, os.path.dirname(page.file.src_uri) or ".")
        return f"[{text}]({uri}{anchor})"

    return LINK.sub(moved, spaced(markdown))


def on_page_content(html: str, page: Page, config, files: Files) -> str:
    """The links of notebooks, which are no Markdown when mkdocs sees them."""
    if page.file.src_uri.endswith(".ipynb"):
        html = re.sub(r'(?<=href=")((?:\.\./)*\w+)\.md(?=["#])', r"\1.html", html)
    return html


def spaced(markdown: str) -> str:
    """With the empty lines around lists, tables and comments that the site's Markdown asks for."""
    lines, fenced = [""], False
    for line in markdown.splitlines():
        before = lines[-1]
        fenced ^= line.lstrip().startswith("```")
        begins = BLOCK.match(line) and not before.startswith((line[:1], " "))
        if not fenced and before and (begins or before.startswith("<!--")):
            lines.append("")
        lines.append(line)
    return "\n".join(lines[1:])
