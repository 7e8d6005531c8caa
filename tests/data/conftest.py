from helpers.s3 import bucket, server  # noqa: F401
