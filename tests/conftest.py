"""Settings that every test shares. Set before torch, Detectron2 or transformers is imported.

They are environment variables where they can be, so that processes which tests start have them too.
"""

import os
import tempfile

for name in [name for name in os.environ if name.startswith("DYNAMIC_DINO")]:
    del os.environ[name]  # what a developer switched on must not decide what is tested
os.environ["OMP_NUM_THREADS"] = "1"  # small tensors: more threads only get into each other's way
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs a download is a mistake; fail at once
os.environ["MPLBACKEND"] = "agg"
_datasets = tempfile.TemporaryDirectory(prefix="dynamic-dino-tests-")
os.environ["DETECTRON2_DATASETS"] = _datasets.name

import torch  # noqa: E402

torch.set_num_threads(1)
