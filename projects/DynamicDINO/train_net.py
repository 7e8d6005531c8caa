#!/usr/bin/env python
"""Trains or evaluates a detector by a recipe; see --help and `dynamic_dino.engine.cli`."""

import sys

from dynamic_dino.cli import train

if __name__ == "__main__":
    sys.exit(train())
