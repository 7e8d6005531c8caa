"""What README, the pages and RESULTS.md say is what the committed files say."""

import json
import re
import shutil
import subprocess

import pytest
from lib import tables


@pytest.fixture
def copies(tmp_path, monkeypatch):
    shutil.copytree(tables.RESULTS, tmp_path / "results")
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    shutil.copy(tables.PAGE, tmp_path)
    monkeypatch.setattr(tables, "PAGE", tmp_path / tables.PAGE.name)
    documents = [tmp_path / f"{number}.md" for number in range(len(tables.DOCUMENTS))]
    for original, copy in zip(tables.DOCUMENTS, documents, strict=True):
        shutil.copy(original, copy)
    monkeypatch.setattr(tables, "DOCUMENTS", documents)
    return tmp_path


def test_committed_pages_agree_with_the_files(capsys):
    assert tables.update(check=True) == 0, capsys.readouterr().out


def test_every_table_of_the_documents_and_of_the_results_is_there():
    page, files = tables.page(), {file for _, file, _ in tables.TABLES.values()}
    for path in tables.RESULTS.glob("*/*.json"):
        if path.stem in files:
            assert f"results/{path.parent.name}/{path.name}" in page
            report = json.loads(path.read_text())
            assert report["machine"] in page and report["commit"][:12] in page
            assert not report["commit"].endswith("-dirty")
    for document in tables.DOCUMENTS:
        marked = {match[2] for match in tables.MARKED.finditer(document.read_text())}
        assert marked and marked <= {*tables.TABLES}, document


def git(*arguments: str) -> str:
    """What git says about this checkout. Raises `OSError` without git, or outside a repository."""
    done = subprocess.run(["git", "-C", tables.RESULTS, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(done.stderr)
    return done.stdout


def test_every_result_is_of_a_commit_in_the_history():
    try:
        if git("rev-parse", "--is-shallow-repository").strip() == "true":
            pytest.skip("the clone is shallow: it has no history to look into")
        history = set(git("rev-list", "HEAD").split())
    except OSError as error:
        pytest.skip(f"no git history: {error}")
    reports = {path: json.loads(path.read_text()) for path in tables.RESULTS.rglob("*.json")}
    commits = {path: report["commit"] for path, report in reports.items() if "commit" in report}
    assert len(commits) > 20
    assert not {path: commit for path, commit in commits.items() if commit not in history}


def test_a_number_that_was_changed_by_hand_is_found_and_restored(copies, capsys):
    page = copies / "RESULTS.md"
    before = page.read_text()
    number = re.search(r"\| (\d+\.\d+) \|", before)[1]
    page.write_text(before.replace(number, "99.99", 1))
    assert tables.update(check=True) == 1 and "RESULTS.md disagrees" in capsys.readouterr().out
    assert page.read_text() != before
    assert tables.update() == 0 and page.read_text() == before


def test_a_new_measurement_changes_every_page_that_shows_it(copies):
    path = copies / "results/cpu/nano_stamps.json"
    report = json.loads(path.read_text())
    report["runs"]["dense"]["scores"]["val/AP50"] = 12.34
    path.write_text(json.dumps(report))
    assert tables.update(check=True) == 1
    assert tables.update() == 0
    shown = [p for p in copies.glob("*.md") if "| dense | 8750 | 12.3 |" in p.read_text()]
    assert len(shown) == 2  # RESULTS.md and the page about accuracy
