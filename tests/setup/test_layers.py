"""The stair: a package imports what stands below it, never the other way round.

The contracts are in pyproject.toml; `lint-imports` checks them on the command line.
"""

import subprocess
import sys
from pathlib import Path

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
LINT_IMPORTS = "from importlinter.cli import lint_imports_command; lint_imports_command()"


def test_no_import_climbs_and_no_two_packages_import_each_other():
    # In a process of its own, because it sets up logging.
    command = [sys.executable, "-c", LINT_IMPORTS, str(PYPROJECT), "--no-cache", "--no-logo"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
