"""The benchmark runs as a user starts it, with few names."""

import json

import host_work
from helpers.scripts import run_script
from lib import tables


def test_every_kind_of_work_is_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(host_work, "POOL", 60)
    small = "--batch 2 --names 5 --objects 3 --repeats 2".split()
    text = run_script(host_work.main, *small, "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert all(0 < row["low_ms"] <= row["high_ms"] for row in report["rows"].values())
    assert all(name in text and name in tables.host_work(report) for name in report["rows"])


def test_an_encoder_that_trains_encodes_each_step_and_a_frozen_one_once():
    for trains, expected in ((True, [4, 4]), (False, [4, 0])):
        encoder, calls = host_work.encoder(trains), []
        encoder.body.register_forward_pre_hook(
            lambda body, _, given, calls=calls: calls.append(given["input_ids"].shape[0]),
            with_kwargs=True,
        )
        prompts = [host_work.Prompt.from_phrases(["red cup", "tea"])]
        runs = []
        for _ in range(2):
            encoder(prompts)
            runs.append(sum(calls) - sum(runs))
        assert runs == expected, "two names, [CLS] and [SEP]"
