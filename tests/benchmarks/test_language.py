"""Routers in BERT: what is compared starts equal, is counted right, and has texts of its own."""

import argparse
import copy
import runpy

import language
import pytest
import torch
from helpers.seeds import fresh_rng
from language import FORCED, ROWS
from lib import docstrings, tables
from lib.routed_classifier import Row, Samples, batches, classifier, evaluate, operations, train
from torch import nn
from transformers import BertConfig, BertModel

DIM, HIDDEN, CLASSES = 16, 24, 3


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(int(fresh_rng().integers(10**6)))
    sizes = dict(hidden_size=DIM, intermediate_size=HIDDEN, num_attention_heads=2, vocab_size=50)
    return BertModel(BertConfig(num_hidden_layers=3, **sizes), add_pooling_layer=False).eval()


@pytest.fixture(scope="module")
def texts(bert):
    rng = fresh_rng()
    ids = [torch.from_numpy(rng.integers(0, 50, int(n))) for n in rng.integers(3, 9, 40)]

    def tokenize(batch, **_):
        found = [ids[int(text)] for text in batch]
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(i) for i in found], True)
        return {"input_ids": nn.utils.rnn.pad_sequence(found, True), "attention_mask": mask}

    labelled = [(str(i), i % CLASSES) for i in range(len(ids))]
    return language.lower_states(bert, tokenize, labelled, 1, 20), ids


def test_all_rows_start_as_the_encoder_and_train_their_ffns_alone(bert, texts):
    data, ids = texts
    states, mask, labels = data.batch([0, 5, 7])
    whole = torch.stack([bert(ids[i][None]).last_hidden_state.mean(1)[0] for i in (0, 5, 7)])
    options = argparse.Namespace(lr=1e-2, points=2, period=2)
    todo = list(batches(len(data.states), 2, 16, seed=0))
    for name, row in ROWS.items():
        model = classifier(bert, row, CLASSES, first=1)
        logits, routings = model.eval()(states, mask)
        torch.testing.assert_close(logits, model.head(whole), rtol=1e-4, atol=1e-4)
        before = copy.deepcopy(model.state_dict())
        found = train(model, row, data, todo, {"accuracy": data}, options, FORCED)
        changed = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
        assert changed and all(n.startswith(("encoder.ffns.", "head.")) for n in changed)
        assert [point["step"] for point in found["curve"]] == [3, 6]
        assert found["accuracy"] == found["curve"][-1]["accuracy"]
        assert ("forced" in found) == (name == "dynmoe") and len(found["routing"]) == len(routings)
        taken = {"dense": 1, "top1": 1, "top2": 2, "top4": 4}.get(name)
        if taken:
            assert found["train_experts_per_token"] == pytest.approx(taken)
        else:
            assert 0 < found["train_experts_per_token"] <= language.EXPERTS


def test_operations_are_those_of_the_tokens_that_are_there(bert, texts):
    data, _ = texts
    chosen = [1, 2, 3]
    states, mask, _ = data.batch(chosen)
    lengths = [len(data.states[i]) for i in chosen]
    tokens = sum(lengths)
    attention = 4 * tokens * DIM**2 + 2 * DIM * sum(n * n for n in lengths)
    for name, k in (("dense", 1), ("top1", 1), ("top4", 4)):
        model = classifier(bert, ROWS[name], CLASSES, first=1)
        routings = model(states, mask)[1]
        router = 3 * tokens * DIM * language.EXPERTS * (name != "dense")
        ffn = 3 * k * tokens * 2 * DIM * HIDDEN
        want = attention + 2 * attention + 2 * (ffn + router)  # two layers
        assert operations(model, mask, routings) == want
    wide = operations(classifier(bert, Row("", None, copies=3), CLASSES, first=1), mask, [])
    assert wide == 3 * attention + 2 * 3 * 3 * tokens * 2 * DIM * HIDDEN
    model = classifier(bert, ROWS["dense"], CLASSES, first=1)
    assert 0 <= evaluate(model, Samples(data.states, data.labels))[0] <= 100


def test_no_file_has_texts_for_training_and_for_the_test(tmp_path, monkeypatch):
    body = '''def f{0}():
    """Says the number {0} of {1} aloud.

    Not this.
    """
    def inner():
        """Stands in two of the classes alike."""
'''
    for part in ("one", "two"):
        for i in range(6):
            file = tmp_path / "lib" / part / f"{i}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(body.format(i, part))
        (tmp_path / "lib" / part / "tests").mkdir()
        (tmp_path / "lib" / part / "tests" / "t.py").write_text(body.format(99, part))
    (tmp_path / "lib/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(docstrings, "CLASSES", ("lib.one", "lib.two"))
    folders = {name: tmp_path / name.replace(".", "/") for name in docstrings.CLASSES}
    found = {name: sorted(folder.glob("*.py")) for name, folder in folders.items()}
    monkeypatch.setattr(docstrings, "python_files", found.get)
    train_texts, test_texts = docstrings.read(most=3)
    assert len(train_texts) == 6 and len(test_texts) == 2
    assert not {t for t, _ in train_texts} & {t for t, _ in test_texts}
    for text, label in train_texts + test_texts:
        assert text.startswith("Says the number") and text.endswith(
            ("one", "two")[label] + " aloud."
        )
    with pytest.raises(FileNotFoundError, match="pip install nowhere"):
        runpy.run_path(docstrings.__file__)["python_files"]("nowhere.part")
    found = runpy.run_path(docstrings.__file__)["python_files"]("torch.optim")
    assert found and not any("test" in file.name for file in found)


def test_table_compares_with_dense_and_a_fixed_k_with_the_model_itself():
    row = {"experts_per_token": 2.5, "active_experts": 7}
    seeds = {
        seed: {
            "dense": {"accuracy": 60 + i, "curve": [{"gmacs": 10.0}], "routing": [],
                      "train_experts_per_token": 1.0},
            "dynmoe": {"accuracy": 63 + i, "curve": [{"gmacs": 25.0}], "routing": [row],
                       "train_experts_per_token": 3.0, "forced": {"1": 61.0 + i}},
        }
        for i, seed in enumerate(("0", "1"))
    }  # fmt: skip
    text = tables.language({"seeds": seeds, "texts": {"training": 1080, "test": 540}})
    assert "| +3.0 ± 0.0 | 3.0 | 2.5 | 7.0 | 2.50 |" in text
    assert "| 1 | 61.5" in text and "-2.0 ± 0.0" in text
