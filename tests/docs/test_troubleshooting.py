"""The page of problems has those that the package knows.

`PYTHONPATH=tests python tests/docs/test_troubleshooting.py` renews it.
"""

import re

from dynamic_dino.data.problems import KINDS, table_of_kinds
from helpers.documentation import PROJECT

PAGE = PROJECT / "docs/troubleshooting.md"
BEGIN, END = "<!-- kinds of problems -->", "<!-- end of the kinds of problems -->"


def renewed(text: str) -> str:
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table_of_kinds()}\n{END}{rest.split(END)[1]}"


def test_the_table_of_kinds_is_that_of_the_package():
    text = PAGE.read_text()
    assert text == renewed(text), "this file renews it, see above"


def test_every_kind_of_problem_is_in_it():
    code = "".join(path.read_text() for path in (PROJECT / "dynamic_dino/data").rglob("*.py"))
    assert {*re.findall(r'DataError\(\s*"([^"]+)"', code)} <= KINDS.keys()


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text()))
