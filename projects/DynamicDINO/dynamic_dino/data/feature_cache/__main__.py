"""``python -m dynamic_dino.data.feature_cache``: caches the features of a config's backbone."""

from __future__ import annotations

import argparse

from ...config import load_config
from ...console import command, program
from .build import cache_features


@command
def main() -> None:
    parser = argparse.ArgumentParser(
        prog=program(), description="Caches the features of a config's frozen backbone on disk."
    )
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--flips", choices=("mirror", "store"), default="mirror")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--num-workers", type=int, default=0)
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a cache of other features"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = vars(parser.parse_args())
    cfg = load_config(options.pop("config_file"), options.pop("overrides"))
    for cache in cache_features(cfg, **options):
        print(f"{cache.root}: features of {len(cache)} images")


if __name__ == "__main__":
    main()
