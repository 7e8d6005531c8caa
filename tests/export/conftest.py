from helpers.nano import _nano, nano, nano_config  # noqa: F401
