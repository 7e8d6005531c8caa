"""`PartRouter`: each part of the FFN once, equal to dense at the start, a gradient for any k."""

import pytest
import torch
from dynamic_dino.modeling.feed_forward import FeedForward
from dynamic_dino.moe.layer import MoEFeedForward
from dynamic_dino.moe.part_router import PartRouter
from dynamic_dino.moe.statistics import RoutingStatistics


@pytest.mark.parametrize(("experts", "parts"), [(16, 2), (8, 1), (12, 4), (6, 3), (2, 2)])
def test_each_slot_takes_the_best_copy_of_its_part(experts, parts):
    router = PartRouter(7, experts, parts)
    torch.nn.init.normal_(router.weight)
    x = torch.randn(2, 9, 7)
    result = router(x)
    logits = x.flatten(0, 1) @ router.weight.T
    for token, row in enumerate(logits.tolist()):
        for part in range(parts):
            own = range(part, experts, parts)
            assert result.expert_ids[token, part] == max(own, key=row.__getitem__)
    assert torch.equal(result.gates, torch.ones(18, parts))
    torch.testing.assert_close(result.probs, logits.softmax(-1))


@pytest.mark.parametrize(("experts", "parts"), [(16, 2), (8, 1), (12, 4)])
def test_a_converted_ffn_starts_as_the_dense_one_and_never_lacks_a_part(experts, parts):
    dense = FeedForward(12, 24)
    router = PartRouter(12, experts, parts)
    layer = MoEFeedForward(12, 24, router=router)
    layer.load_state_dict(dense.state_dict())
    x = torch.randn(3, 40, 12)
    y, routing = layer(x)
    torch.testing.assert_close(y, dense(x)[0], atol=1e-5, rtol=1e-5)
    torch.nn.init.normal_(router.weight)  # as if trained
    statistics = RoutingStatistics()
    statistics.update([layer(x)[1]])
    (row,) = statistics.summary()
    assert row["same_part"] == 0 and row["experts_per_token"] == parts
    if parts == 1:
        assert row["siblings"] == 1
    assert routing.parts == parts


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_gradient_of_the_gates_is_that_of_log_p(parts):
    router = PartRouter(6, 8, parts)
    torch.nn.init.normal_(router.weight)
    x, upstream = torch.randn(1, 11, 6), torch.randn(11, parts)
    result = router(x)
    (result.gates * upstream).sum().backward()
    found, router.weight.grad = router.weight.grad.clone(), None
    logits = (x[0] @ router.weight.T).unflatten(1, (-1, parts))
    logp = logits.log_softmax(1).amax(1)
    (logp * upstream).sum().backward()
    torch.testing.assert_close(found, router.weight.grad, atol=1e-5, rtol=1e-4)
    assert found.abs().max() > 0


def test_siblings_part_when_trained():
    layer = MoEFeedForward(8, 16, router=PartRouter(8, 8, 2))
    layer.load_state_dict(FeedForward(8, 16).state_dict())
    pairs = layer.router.weight.unflatten(0, (-1, 2))
    assert torch.equal(pairs[:, 0], pairs[:, 1])
    optimizer = torch.optim.AdamW(layer.parameters(), 1e-2)
    for _ in range(3):
        x = torch.randn(1, 64, 8)
        (layer(x)[0] - x.flip(2)).square().mean().backward()
        optimizer.step()
    pairs = layer.router.weight.unflatten(0, (-1, 2))
    assert (pairs[:, 0] - pairs[:, 1]).abs().max() > 1e-4


def test_sizes_that_do_not_divide():
    with pytest.raises(ValueError, match="num_experts=9 is not a multiple of parts=2"):
        PartRouter(8, 9, 2)
    with pytest.raises(ValueError, match="doesn't divide the FFN's hidden size 15"):
        MoEFeedForward(8, 15, router=PartRouter(8, 8, 2))


def test_dropped_experts_get_no_token():
    router = PartRouter(6, 8, 2)
    torch.nn.init.normal_(router.weight)
    x = torch.randn(1, 200, 6)
    before = router(x).expert_ids
    router.drop(2, 5)
    after = router(x)
    assert not torch.isin(after.expert_ids, torch.tensor([2, 5])).any()
    kept = ~torch.isin(before, torch.tensor([2, 5]))
    assert torch.equal(after.expert_ids[kept], before[kept])
    assert torch.equal(after.expert_ids % 2, torch.tensor([0, 1]).expand(200, 2).int())
    router.drop(0, 2, 4, 6)  # the first part, of every copy
    nothing = router(x)
    assert (nothing.expert_ids[:, 0] == -1).all() and (nothing.gates[:, 0] == 0).all()
    assert torch.equal(nothing.expert_ids[:, 1], before[:, 1])
