"""Fewer copies of an FFN: nothing changes where they are alike; means are weighted by loads."""

import json

import numpy as np
import pytest
import torch
from dynamic_dino.checkpoint.__main__ import main
from dynamic_dino.checkpoint.files import read_state_dict
from dynamic_dino.modeling.feed_forward import FeedForward
from dynamic_dino.moe.compress import METHODS, compress
from dynamic_dino.moe.hierarchical import HierarchicalRouter
from dynamic_dino.moe.layer import MoEFeedForward
from dynamic_dino.moe.part_router import PartRouter
from dynamic_dino.moe.routers import SoftmaxRouter
from dynamic_dino.moe.top_any import TopAnyRouter
from helpers.seeds import fresh_rng
from torch import nn

DIM, HIDDEN = 6, 8
ROUTERS = {
    "softmax": lambda n, k: SoftmaxRouter(DIM, n * k, k),
    "parts": lambda n, k: PartRouter(DIM, n * k, k),
    "flat": lambda n, k: HierarchicalRouter(DIM, n, k, variant="instance"),
    "top_any": lambda n, k: TopAnyRouter(DIM, num_experts=n, initial_experts=n),
}


def mixture(copies: int, k: int, router: str = "softmax") -> tuple[nn.Module, FeedForward]:
    """A model of two layers that starts from one dense FFN, and that."""
    dense = FeedForward(DIM, HIDDEN)
    model = nn.ModuleList(MoEFeedForward(DIM, HIDDEN, ROUTERS[router](copies, k)) for _ in range(2))
    for layer in model:
        layer.load_state_dict(dense.state_dict())
    return model.eval(), dense


def rebuilt(state: dict, copies: int, k: int, router: str = "softmax") -> nn.Module:
    model, _ = mixture(copies, k, router)
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("router", ROUTERS)
def test_copies_that_are_alike_make_the_dense_ffn(router):
    rng = fresh_rng()
    copies, k = int(rng.integers(2, 6)), int(rng.choice([1, 2, 4]))
    copies = max(copies, k)
    model, dense = mixture(copies, k, router)
    loads = [torch.from_numpy(rng.random(layer.router.num_experts)) for layer in model]
    x = torch.randn(2, 9, DIM)
    both = nn.ModuleList([FeedForward(DIM, HIDDEN), FeedForward(DIM, HIDDEN)])
    both.load_state_dict(compress(model, loads))
    for layer in both:
        torch.testing.assert_close(layer(x)[0], dense(x)[0])
    if router in ("softmax", "parts"):
        for method in METHODS:
            few = int(rng.integers(1, copies + 1))
            smaller = rebuilt(compress(model, loads, few, method), few, k, router)
            torch.testing.assert_close(smaller[1](x)[0], dense(x)[0])


def test_means_are_weighted_by_loads():
    copies, k = 3, 2
    model, _ = mixture(copies, k)
    with torch.no_grad():
        for p in model[0].experts.parameters():
            p.normal_()
    load = torch.rand(copies * k)
    load[1::2] = torch.tensor([0.0, 0.4, 0.0])  # the second part: copy 1 alone
    state = compress(model, [load, torch.zeros(copies * k)])
    w1, w2, b2 = (getattr(model[0].experts, name) for name in ("w1", "w2", "b2"))
    first = load[::2] / load[::2].sum()
    half = HIDDEN // 2
    expected = (first[:, None, None] * w1[::2]).sum(0)
    torch.testing.assert_close(state["0.linear1.weight"][:half], expected)
    torch.testing.assert_close(state["0.linear1.weight"][half:], w1[3])
    torch.testing.assert_close(state["0.linear2.weight"][:, half:], w2[3])
    bias = (first[:, None] * b2[::2]).sum(0) + b2[3]
    torch.testing.assert_close(state["0.linear2.bias"], bias)


def test_what_is_alike_is_merged_first_and_what_is_used_is_kept():
    rng = fresh_rng()
    copies, k = 5, 2
    model, _ = mixture(copies, k)
    with torch.no_grad():
        for layer in model:
            for p in [*layer.experts.parameters(), layer.router.weight]:
                p.normal_()
            layer.router.weight[1::k] = layer.router.weight[::k]  # parts stay together
            i, j = sorted(int(n) for n in rng.choice(copies, 2, replace=False))
            for p in [*layer.experts.parameters(), layer.router.weight]:
                p[j * k : j * k + k] = p[i * k : i * k + k]
    x = torch.randn(1, 50, DIM)
    load = torch.from_numpy(rng.uniform(0.1, 1, copies * k)).float()
    all_but_one = rebuilt(compress(model, [load, load], copies - 1), copies - 1, k)
    for new, old in zip(all_but_one, model, strict=True):
        torch.testing.assert_close(new(x)[0], old(x)[0])
    kept = compress(model, [load, load], 2, "prune")
    best = np.sort(load.view(copies, k).sum(1).argsort(descending=True)[:2].numpy())
    rows = model[0].router.weight.view(copies, k, DIM)[best].flatten(0, 1)
    assert torch.equal(kept["0.router.weight"], rows)
    # Copies that no token takes cost nothing: they go first, and change nothing.
    load[:k] = 0
    merged = compress(model, [load, load], copies - 1)
    assert any(
        torch.allclose(merged["0.experts.w1"][e], model[0].experts.w1[e + k]) for e in range(2)
    )


def test_what_cannot_be_compressed_is_named():
    model, _ = mixture(4, 2)
    for arguments, message in (
        ((None, 5), "copies=5: choose 1 to 4, which 0 has"),
        ((None, 2, "magic"), "method 'magic': choose one of merge, prune"),
        (([torch.ones(8)],), "loads of 1 mixtures for a model with 2"),
        (([torch.ones(4)] * 2,), r"0: loads \[4\] of 8 experts"),
    ):
        with pytest.raises(ValueError, match=message):
            compress(model, *arguments)
    with pytest.raises(ValueError, match="has no mixture"):
        compress(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="experts of HierarchicalRouter .0. can't be left out"):
        compress(mixture(4, 1, "flat")[0], copies=2)


def test_command(tmp_path, capsys):
    recipe = "configs/moe_tuning/nano_x16_stamps.py"
    source = "package:dynamic_dino/weights/nano_x16.safetensors"
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"routing": [{"load": [1 / 16] * 16}] * 3}))
    out = tmp_path / "dense.safetensors"
    main(["compress", "--config-file", recipe, source, str(out), "--results", str(results)])
    said = capsys.readouterr().out
    assert str(results) in said and "the recipe of the dense model" in said
    state = read_state_dict(out)
    assert state["decoder.layers.0.ffn.linear1.weight"].shape[0] > 0
    assert not any(".experts." in name for name in state)
    results.write_text("{}")
    with pytest.raises(SystemExit) as error:
        main(["compress", "--config-file", recipe, source, str(out), "--results", str(results)])
    assert error.value.code == 2
    assert "results.json: no loads of experts" in capsys.readouterr().err
