"""Files that stand beside the code and repeat something of it."""

import re
from pathlib import Path

import dynamic_dino
import pytest
import yaml

ROOT = Path(__file__).parents[2]


def pinned(name: str) -> str:
    return re.search(rf"^{name}==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)[1]


def test_citation_names_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == dynamic_dino.__version__


def test_pre_commit_runs_the_pinned_ruff():
    (hooks,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert hooks["rev"] == f"v{pinned('ruff')}"


def test_workflow_runs_targets_that_exist_on_every_python_that_setup_allows():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for command in commands:
        assert command == ".ci/run" or command.removeprefix("make ") in targets, command
    low, high = re.search(
        r'python_requires=">=3\.(\d+),<3\.(\d+)"', (ROOT / "setup.py").read_text()
    ).groups()
    versions = [f"3.{minor}" for minor in range(int(low), int(high))]
    assert jobs["test"]["strategy"]["matrix"]["python-version"] == versions


@pytest.mark.parametrize("form", ["bug", "idea"])
def test_issue_forms_have_what_they_need(form):
    content = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{form}.yml").read_text())
    assert {"name", "description", "body"} <= content.keys()
    ids = [field["id"] for field in content["body"]]
    assert len(set(ids)) == len(ids) and all("label" in f["attributes"] for f in content["body"])
