from helpers.nano import _nano, draw, nano, nano_config  # noqa: F401
