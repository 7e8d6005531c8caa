"""What README and RESULTS.md say is what the committed files say."""

import json
import re
import shutil

import pytest
from lib import tables


@pytest.fixture
def copies(tmp_path, monkeypatch):
    shutil.copytree(tables.RESULTS, tmp_path / "results")
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    for name in ("README", "PAGE"):
        original = getattr(tables, name)
        shutil.copy(original, tmp_path / original.name)
        monkeypatch.setattr(tables, name, tmp_path / original.name)
    return tmp_path


def test_committed_pages_agree_with_the_files(capsys):
    assert tables.update(check=True) == 0, capsys.readouterr().out


def test_every_table_of_readme_and_of_the_results_is_there():
    page, files = tables.page(), {file for _, file, _ in tables.TABLES.values()}
    for path in tables.RESULTS.glob("*/*.json"):
        if path.stem in files:
            assert f"results/{path.parent.name}/{path.name}" in page
            report = json.loads(path.read_text())
            assert report["machine"] in page and report["commit"][:12] in page
            assert not report["commit"].endswith("-dirty")
    assert {m[2] for m in tables.MARKED.finditer(tables.README.read_text())} <= {*tables.TABLES}


def test_a_number_that_was_changed_by_hand_is_found_and_restored(copies, capsys):
    page = copies / "RESULTS.md"
    before = page.read_text()
    number = re.search(r"\| (\d+\.\d+) \|", before)[1]
    page.write_text(before.replace(number, "99.99", 1))
    assert tables.update(check=True) == 1 and "RESULTS.md disagrees" in capsys.readouterr().out
    assert page.read_text() != before
    assert tables.update() == 0 and page.read_text() == before


def test_a_new_measurement_changes_both_pages(copies):
    path = copies / "results/cpu/nano_stamps.json"
    report = json.loads(path.read_text())
    report["runs"]["dense"]["scores"]["val/AP50"] = 12.34
    path.write_text(json.dumps(report))
    assert tables.update(check=True) == 1
    assert tables.update() == 0
    for page in ("README.md", "RESULTS.md"):
        assert "| dense | 8750 | 12.3 |" in (copies / page).read_text()
