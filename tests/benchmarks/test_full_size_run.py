"""What the benchmark of a whole run tells; the run itself takes minutes."""

import os

import full_size_run
from lib import tables


def test_half_written_rows_wait(tmp_path):
    start = full_size_run.Start.__new__(full_size_run.Start)
    start.output = tmp_path
    assert start.rows() == []
    (tmp_path / "metrics.json").write_text('{"iteration": 0}\n{"iter')
    assert start.rows() == [{"iteration": 0}]
    start.rows_before = [{"iteration": i, "time": 1} for i in range(3)]
    again = {"iteration": 2, "time": 2}  # the checkpoint was of iteration 1
    start.rows = lambda: [*start.rows_before[:2], again]
    assert start.new_rows() == [again]


def test_only_what_trains_is_measured():
    assert full_size_run.children(os.getpid()) == []
    assert 0 < full_size_run.cpu_seconds(os.getpid()) < 1e6


def test_the_table():
    memory = [{"rss": 3, "pss": 2_000_000, "private": 1_000_000}]
    start = dict(iteration=4, first_iteration_seconds=7.2, cpu_seconds=9.9)
    report = dict(records=1_563_000, ranks=2, workers_of_a_rank=2, cache_bytes=547e6)
    report |= dict(starts={"resumed": start | dict(ranks=memory, workers=memory)})
    table = tables.full_size_run(report | dict(equal_tensors=5, tensors=5))
    assert "| resumed | 4 | 7 | 10 | 1 | 2 | 1 | 2 |" in table
    assert "1,563,000 records" in table and "5 of 5 tensors" in table
