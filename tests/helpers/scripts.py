"""Scripts of benchmarks/, run in this process: another one would import everything once more."""

import io
import sys
from collections.abc import Callable
from contextlib import redirect_stdout

import pytest


def run_script(main: Callable, *arguments: object) -> str:
    """Calls a script's `main` as its command line would; returns what it prints.

    Raises:
        SystemExit: the script ended otherwise than by returning.
    """
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output):
        patch.setattr(sys, "argv", [sys.modules[main.__module__].__file__, *map(str, arguments)])
        main()
    return output.getvalue()
