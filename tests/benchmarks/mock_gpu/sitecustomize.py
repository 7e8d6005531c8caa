"""Python imports this at its start where this folder is on PYTHONPATH: processes that a rehearsed
script starts pretend as well, whatever starts them."""

import bare_python
import mock_cuda

bare_python.install()
mock_cuda.install()
