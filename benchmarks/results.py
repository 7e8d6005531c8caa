#!/usr/bin/env python
"""Writes what stands in benchmarks/results/ as tables: RESULTS.md, and marked parts of documents.

    python benchmarks/results.py            # after a benchmark was run with --save
    python benchmarks/results.py --check    # says whether they agree; exit status 1 if not

A number in a table is always that of a committed file; ``lib/tables.py`` makes the tables.
"""

from __future__ import annotations

import argparse
import sys

from lib.tables import update

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    sys.exit(update(parser.parse_args().check))
