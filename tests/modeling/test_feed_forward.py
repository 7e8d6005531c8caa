"""The dense FFN, and a wider one that starts from its weights."""

import pytest
import torch
from dynamic_dino.modeling.feed_forward import FeedForward
from helpers.seeds import fresh_rng


def test_a_wider_ffn_starts_as_the_narrow_one_and_all_its_units_can_learn():
    rng = fresh_rng()
    dim, narrow, more = (int(n) for n in rng.integers(1, 20, 3))
    torch.manual_seed(int(rng.integers(10**6)))
    x = torch.randn(2, 5, dim)
    small, wide = FeedForward(dim, narrow), FeedForward(dim, narrow + more, widen=True)
    drawn = wide.linear1.weight.detach().clone()
    weights = small.state_dict()
    kept = {name: value.clone() for name, value in weights.items()}
    wide.load_state_dict(weights)
    torch.testing.assert_close(wide(x)[0], small(x)[0])
    assert torch.equal(wide.linear1.weight[narrow:], drawn[narrow:])
    assert all(torch.equal(kept[name], value) for name, value in weights.items())
    wide.linear1.bias.data[narrow:] = 100.0  # active
    wide(x)[0].sum().backward()
    assert wide.linear2.weight.grad[:, narrow:].ne(0).all()
    again = FeedForward(dim, narrow + more, widen=True)
    again.load_state_dict(wide.state_dict())
    assert torch.equal(again(x)[0], wide(x)[0])


def test_a_narrower_ffn_is_refused():
    weights = FeedForward(4, 9).state_dict()
    with pytest.raises(ValueError, match="linear1.weight has 9 hidden units, more than the 8"):
        FeedForward(4, 8, widen=True).load_state_dict(weights)
    with pytest.raises(RuntimeError, match="size mismatch"):
        FeedForward(4, 10).load_state_dict(weights)
