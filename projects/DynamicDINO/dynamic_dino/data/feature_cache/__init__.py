"""Features of a frozen backbone on disk, so that training on a CPU need not compute them again.

A cache is a folder: ``manifest.json`` says what the features are of (images, canvas, weights of
the backbone), ``<level>.npy`` holds float16 [rows, C, H, W], ``done.npy`` marks the rows that are
written, so that an interrupted build goes on where it stopped. nano at 320 pixels: 282 kB an image.

Flips. ``flips="mirror"`` mirrors the cached features when they are read. That is approximate: a
strided convolution of a mirrored image is not exactly the mirrored convolution. It is done only
where the cells of the grid land on cells again, that is, where the content's width is a multiple of
the coarsest stride; other images are not flipped. ``flips="store"`` also stores the features of
each mirrored image: exact, twice the space and time.

    python -m dynamic_dino.data.feature_cache --config-file CONFIG [key=value ...]
"""

from .build import build_feature_cache, cache_features
from .cache import FeatureCache, check_feature_caches, module_fingerprint

__all__ = [
    "FeatureCache",
    "build_feature_cache",
    "cache_features",
    "check_feature_caches",
    "module_fingerprint",
]
