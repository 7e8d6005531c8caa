"""The site's list of pages is whole; `make docs` checks the rest."""

import ast

import yaml
from helpers.documentation import PROJECT, ROOT

DOCS = PROJECT / "docs"


def leaves(nav) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [leaf for entry in nav for value in dict(entry).values() for leaf in leaves(value)]


def test_every_page_has_its_place_and_every_place_its_page():
    nav = leaves(yaml.safe_load((PROJECT / "mkdocs.yml").read_text())["nav"])
    assigned = {
        node.targets[0].id: node.value
        for node in ast.parse((DOCS / "hooks.py").read_text()).body
        if isinstance(node, ast.Assign)
    }
    project = ast.literal_eval(assigned["PROJECT"])
    elsewhere = eval(
        compile(ast.Expression(assigned["PAGES"]), "PAGES", "eval"), {"PROJECT": project}
    )
    for page, source in elsewhere.items():
        assert (ROOT / source).is_file(), page
    here = {
        p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*") if p.suffix in (".md", ".ipynb")
    }
    assert len(nav) == len({*nav}) and {*nav} == here | {*elsewhere}
