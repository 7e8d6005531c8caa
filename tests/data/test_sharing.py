"""The processes of a machine hold one copy of the records."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from dynamic_dino.data import load_datasets
from helpers import miniatures
from helpers.seeds import fresh_rng


@pytest.mark.slow
def test_processes_of_a_machine_share_the_records(tmp_path):
    file = miniatures.write_flickr30k(tmp_path, fresh_rng())
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*torchrun, Path(__file__).with_name("two_readers.py"), file, tmp_path],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one["records"] == two["records"] == list(load_datasets(str(file)))
    assert one["maps"] and two["maps"] and one["files"] == two["files"]
    assert one["left"] == two["left"] == []
