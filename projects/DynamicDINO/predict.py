#!/usr/bin/env python
"""Detects what a text names in images; see --help and `dynamic_dino.serving.predict`."""

import sys

from dynamic_dino.cli import predict

if __name__ == "__main__":
    sys.exit(predict())
