"""Results say where they come from, on machines without git or a repository too."""

import moe_layer
import pytest
from lib import provenance as report


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A machine without git, and a folder that is no repository."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def test_commit_without_git_is_what_the_environment_says(bare, monkeypatch):
    assert report.provenance()["commit"] == "unknown"
    monkeypatch.setenv("DYNAMIC_DINO_COMMIT", "0123abc-dirty")
    assert report.provenance()["commit"] == "0123abc-dirty"


def test_the_commit_is_that_of_the_code_wherever_it_is_called(tmp_path, monkeypatch):
    here = report.commit()
    monkeypatch.chdir(tmp_path)
    assert report.commit() == here != "unknown"
    monkeypatch.setattr(report, "__file__", str(tmp_path / "provenance.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert report.commit() == "unknown"


def test_a_profile_without_kernels_is_printed(capsys):
    times = dict.fromkeys(("median_us", "low_us", "high_us", "peak_mib"), 1.0)
    times |= {"ran": "graph", "phases_us": {"routing": 0.0, "experts": 0.0}}
    moe_layer.print_row({"case": "T=9", "times": {"dense": times}, "failed": {}})
    assert "graph" in capsys.readouterr().out
