"""Settings that every test shares. Set before torch, Detectron2 or transformers is imported.

They are environment variables where they can be, so that processes which tests start have them too.
"""

import os
import tempfile

# What a developer switched on, or the batch job they sit in, must not decide what is tested.
LAUNCHER = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
for name in list(os.environ):
    if name in LAUNCHER or name.startswith(("DYNAMIC_DINO", "SLURM_")):
        del os.environ[name]
os.environ["OMP_NUM_THREADS"] = "1"  # small tensors: more threads only get into each other's way
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs a download is a mistake; fail at once
os.environ["MPLBACKEND"] = "agg"
_datasets = tempfile.TemporaryDirectory(prefix="dynamic-dino-tests-")
os.environ["DETECTRON2_DATASETS"] = _datasets.name

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first kernel is defined
torch.set_num_threads(1)
