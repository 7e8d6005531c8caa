#!/usr/bin/env python
"""Trains or evaluates a detector by a recipe; see --help and `dynamic_dino.engine.cli`."""

from dynamic_dino.engine.cli import main

if __name__ == "__main__":
    main()
