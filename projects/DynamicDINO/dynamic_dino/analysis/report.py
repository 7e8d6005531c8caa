"""The report: one HTML file that needs no other, and every figure and table as files beside it."""

from __future__ import annotations

import html
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from ..files import writable_folder, write_text
from .figure import ReportFigure, Section, slug

STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --soft: #5b6570; --page: #ffffff; --line: #d9dee3;
  --head: #f2f4f6; --link: #1f5fa8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --soft: #a0a9b2; --page: #16191c;
  --line: #363c42; --head: #22272b; --link: #7db4f0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; color: var(--ink); background: var(--page);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.25rem; margin-top: 3rem;
  border-top: 1px solid var(--line); padding-top: 1rem; }
h3 { font-size: 1.05rem; margin: 2rem 0 0.2rem; }
a { color: var(--link); } p, summary { color: var(--soft); margin: 0.2rem 0 0.8rem; }
nav ul { padding-left: 1.2rem; columns: 18rem; } nav li { break-inside: avoid; }
img { display: block; height: auto; background: white; border-radius: 6px; }
figure { margin: 0 0 0.5rem; overflow-x: auto; } .plot { width: 36rem; max-width: 100%; }
.photo { width: 100%; min-width: 44rem; }
.table { overflow-x: auto; max-width: 100%; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: 0.85rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.6rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { background: var(--head); } th:first-child, .word { text-align: left; }
tr:last-child td { border-bottom: 0; }
"""


def write_report(folder: str | Path, title: str, text: str, sections: Sequence[Section]) -> Path:
    """Writes report.html, and the files of every figure, into the folder; returns the page.

    Raises:
        ValueError: two figures have one name.
        OSError: the folder can't be written to.
    """
    folder = writable_folder(folder, "choose another folder with --output")
    names = [figure.name for section in sections for figure in section.figures]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two figures are called {twice[0]}: their files would be the same")
    for section in sections:
        for figure in section.figures:
            figure.write(folder)
    page = folder / "report.html"
    write_text(page, render(title, text, sections))
    return page


def render(title: str, text: str, sections: Sequence[Section]) -> str:
    """The page, images inside it; nothing is loaded from anywhere, and it runs no script."""
    links = "".join(
        f'<li><a href="#{slug(section.title)}">{html.escape(section.title)}</a></li>\n'
        for section in sections
    )
    body = "".join(_section(section) for section in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n<p>{html.escape(text)}</p>\n"
        f"<nav><ul>\n{links}</ul></nav>\n{body}</body>\n</html>\n"
    )


def _section(section: Section) -> str:
    figures = "".join(_figure(figure) for figure in section.figures)
    text = f"<p>{html.escape(section.text)}</p>\n" if section.text else ""
    heading = f'<h2 id="{slug(section.title)}">{html.escape(section.title)}</h2>\n'
    return f"<section>\n{heading}{text}{figures}</section>\n"


def _figure(figure: ReportFigure) -> str:
    title, reading = html.escape(figure.title), html.escape(figure.reading)
    head = f'<h3 id="{figure.name}">{title}</h3>\n<p>{reading}</p>\n'
    if figure.image is None:
        return head + _table(figure)
    kind = "photo" if figure.is_photo else "plot"
    shown = f'<figure><img class="{kind}" alt="{title}" src="{figure.inline()}"></figure>\n'
    return head + shown + f"<details><summary>Numbers</summary>\n{_table(figure)}</details>\n"


def _table(figure: ReportFigure) -> str:
    words = [isinstance(cell, str) for cell in figure.rows[0]] if figure.rows else []
    head = "".join(
        f"<th{' class=word' if word else ''}>{html.escape(str(name))}</th>"
        for name, word in zip_longest(figure.head, words)
    )
    rows = "".join(
        "<tr>" + "".join(_cell(cell) for cell in row) + "</tr>\n"
        for row in figure.rows[: figure.shown]
    )
    left = len(figure.rows) - min(figure.shown, len(figure.rows))
    more = f"<p>{figure.name}.csv has {'all' if left else 'these'} {len(figure.rows)} rows.</p>\n"
    if not figure.shown:
        return more
    return f'<div class="table"><table>\n<tr>{head}</tr>\n{rows}</table></div>\n{more}'


def _cell(value: object) -> str:
    if isinstance(value, str):
        return f'<td class="word">{html.escape(value)}</td>'
    return f"<td>{_number(value)}</td>"


def _number(value: object) -> str:
    if value is None or value != value:  # nan
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 2 else f"{value:.1f}"
    return str(value)
