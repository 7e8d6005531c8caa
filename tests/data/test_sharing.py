"""The processes of a machine hold one copy of the records."""

import json

from dynamic_dino.data import load_datasets
from helpers import miniatures, two_readers
from helpers.ranks import run_ranks
from helpers.seeds import fresh_rng


def test_processes_of_a_machine_share_the_records(tmp_path):
    file = miniatures.write_flickr30k(tmp_path, fresh_rng())
    run_ranks(two_readers.main, file=file, output=tmp_path)
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one["records"] == two["records"] == list(load_datasets(str(file)))
    assert one["maps"] and two["maps"] and one["files"] == two["files"]
    assert one["left"] == two["left"] == []
