"""The paper's loop is the same function as the others, and a fair baseline: it never waits."""

import pytest
import torch
from dynamic_dino.moe.layer import MoEFeedForward
from dynamic_dino.moe.routers import SoftmaxRouter
from dynamic_dino_kernels import expert_ffn
from dynamic_dino_kernels.moe.reference import sequential
from lib.detectors import LoopedExperts, loops, use_loop
from lib.moe_peers import Loop, Room, looped_ffn
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


def draw(tokens, slots, experts, dim=6, hidden=9):
    shapes = [(tokens, dim), (experts, hidden, dim), (experts, hidden), (experts, dim, hidden)]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in (*shapes, (experts, dim))]
    gates = torch.rand(tokens, slots, dtype=torch.float64)
    ids = torch.rand(tokens, experts).argsort(1)[:, :slots].int()
    return [t.requires_grad_() for t in (*tensors, gates)], ids


@pytest.mark.parametrize(
    "tokens, slots, experts", [(1, 1, 1), (50, 2, 4), (33, 3, 3), (200, 1, 7), (90, 2, 16)]
)
@pytest.mark.parametrize("empty", [0.0, 0.4])
def test_the_loop_is_exact(tokens, slots, experts, empty):
    (*tensors, gates), ids = draw(tokens, slots, experts)
    ids[torch.rand(ids.shape) < empty] = -1
    room = Room.for_routing(ids, experts)
    y = looped_ffn(*tensors, ids, gates, room)
    expected = expert_ffn(*tensors, ids, gates, backend="sequential")
    torch.testing.assert_close(y, expected)
    dy, inputs = torch.randn_like(y), (*tensors, gates)
    for grad, want in zip(
        torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True
    ):
        torch.testing.assert_close(grad, want)
    ones = torch.ones_like(gates)
    expected = expert_ffn(*tensors, ids, ones, backend="sequential")
    torch.testing.assert_close(looped_ffn(*tensors, ids, None, room), expected)


def test_room_is_the_load_rounded_up_and_never_none():
    ids = torch.tensor([[0, 1], [0, -1], [0, 3]]).repeat(11, 1)
    room = Room.for_routing(ids, 5)
    assert room.sizes == [48, 16, 16, 16, 16] == room.limit.tolist()
    assert room.before.tolist() == [-1, 47, 63, 79, 95] and room.rows == 112


def test_slots_beyond_the_room_are_dropped_the_last_first():
    (*tensors, gates), ids = draw(40, 2, 4)
    ids[:, 0], ids[:, 1] = 1, torch.randint(2, 4, (40,))
    room = Room.for_routing(ids[:20], 4)  # 32 for expert 1, but 40 want it
    kept = ids.clone()
    kept[32:, 0] = -1
    for expert in (2, 3):
        kept[:, 1][
            ((ids[:, 1] == expert).cumsum(0) > room.sizes[expert]) & (ids[:, 1] == expert)
        ] = -1
    y = looped_ffn(*tensors, ids, gates, room)
    torch.testing.assert_close(y, expert_ffn(*tensors, kept, gates, backend="sequential"))


class Operators(TorchDispatchMode):
    """Counts what a GPU would launch, and what would wait for it."""

    WAITING = ("aten.nonzero", "aten._local_scalar_dense", "aten.masked_select", "aten.bincount")
    # memory alone, nothing is launched
    FREE = ("aten.empty", "aten.detach", "aten._unsafe_view", "aten.promote_types")

    def __init__(self):
        super().__init__()
        self.launched = self.waited = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, returns = str(function), function._schema.returns
        view = returns and returns[0].alias_info and not returns[0].alias_info.is_write
        self.launched += not view and not name.startswith(self.FREE)
        self.waited += name.startswith(self.WAITING)
        return function(*args, **(kwargs or {}))


def test_operators_and_synchronisations_of_both_loops():
    """At the paper's size: 16 experts, 2 of them a token."""
    (*tensors, gates), ids = draw(900, 2, 16)
    room = Room.for_routing(ids, 16)
    ways = {
        "loop": lambda: looped_ffn(*tensors, ids, gates, room),
        "sequential": lambda: sequential(*tensors, ids, gates, "relu"),
    }
    found = {}
    for name, way in ways.items():
        with torch.no_grad(), Operators() as counted:
            way()
        found[name] = (counted.launched, counted.waited)
    print(found)
    # linear, ReLU and linear of each expert; 10 to dispatch, 4 to combine
    assert found["loop"] == (3 * 16 + 14, 0)
    # eq, nonzero, two gathers, linear, ReLU, linear, product and sum of each; its zeros
    assert found["sequential"] == (9 * 16 + 1, 16)


def test_the_first_call_decides_on_the_room_for_good():
    ffn, (x, gates) = Loop(6, 9, 4), (torch.randn(40, 6), torch.rand(40, 2))
    ids = torch.rand(40, 4).argsort(1)[:, :2].int()
    weights = (ffn.w1, ffn.b1, ffn.w2, ffn.b2)
    with torch.no_grad():
        y, room = ffn(x, ids, gates), ffn.room
        assert torch.equal(ffn(x, ids, gates), y) and ffn.room is room
        expected = expert_ffn(x, *weights, ids, gates, backend="sequential")
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_all_experts_of_a_model_become_loops():
    model = nn.ModuleList(
        [
            MoEFeedForward(8, 32, SoftmaxRouter(8, 4)),
            nn.Linear(2, 2),
            MoEFeedForward(8, 16, SoftmaxRouter(8, 2)),
        ]
    )
    x, norm = torch.randn(2, 30, 8), nn.LayerNorm(8)
    with torch.no_grad():
        expected = [layer(x, norm=norm)[0] for layer in (model[0], model[2])]
        use_loop(model)
        assert [type(layer.experts) for layer in (model[0], model[2])] == [LoopedExperts] * 2
        assert loops(model) == [model[0].experts, model[2].experts]
        for _ in range(2):
            for layer, want in zip((model[0], model[2]), expected, strict=True):
                torch.testing.assert_close(layer(x, norm=norm)[0], want, rtol=1e-4, atol=1e-5)
        with_router = model[0].experts.with_router(x.flatten(0, 1), norm, **model[0].router.block())
        torch.testing.assert_close(with_router[0].view_as(x), expected[0], rtol=1e-4, atol=1e-5)
        assert with_router[1].gates is None
    with pytest.raises(ValueError, match="written for ReLU, but the experts' activation is 'gelu'"):
        use_loop(nn.ModuleList([MoEFeedForward(8, 16, SoftmaxRouter(8, 2), "gelu")]))
