"""torch.compile and torch.export see whole graphs, on every back-end that is not a loop."""

import pytest
import torch
from dynamic_dino_kernels import expert_ffn, ms_deform_attn, route
from dynamic_dino_kernels.moe.grouped import grouped_backward_op, grouped_op
from torch import nn

DIM, HIDDEN, EXPERTS = 20, 24, 5


class Block(nn.Module):
    """Router, experts and norm, as in the decoder."""

    def __init__(self, backend):
        super().__init__()
        self.router = nn.Parameter(torch.randn(EXPERTS, DIM))
        self.w1 = nn.Parameter(torch.randn(EXPERTS, HIDDEN, DIM))
        self.b1 = nn.Parameter(torch.randn(EXPERTS, HIDDEN))
        self.w2 = nn.Parameter(torch.randn(EXPERTS, DIM, HIDDEN))
        self.b2 = nn.Parameter(torch.randn(EXPERTS, DIM))
        self.norm = nn.LayerNorm(DIM)
        self.backend = backend

    def forward(self, x):
        ids, gates, _, blocks = route(x, self.router, 2, backend=self.backend)
        weights = (self.w1, self.b1, self.w2, self.b2)
        norm = (self.norm.weight, self.norm.bias, self.norm.eps)
        options = dict(norm=norm, blocks=blocks, backend=self.backend)
        return expert_ffn(x, *weights, ids, gates, **options)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", "grouped", "triton"])
def test_compiles_without_a_graph_break(backend):
    block, x = Block(backend), torch.randn(37, DIM, requires_grad=True)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    tensors = (x, *block.parameters())
    y, expected = compiled(x), block(x)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    for grad, want in zip(
        torch.autograd.grad(y, tensors, dy), torch.autograd.grad(expected, tensors, dy), strict=True
    ):
        torch.testing.assert_close(grad, want)


@pytest.mark.slow
def test_deformable_attention_compiles_without_a_graph_break():
    value, shapes = torch.randn(1, 20, 2, 8, requires_grad=True), [(4, 4), (2, 2)]
    locations = torch.rand(1, 3, 2, 2, 4, 2)
    weights = torch.rand(1, 3, 2, 2, 4)
    for backend in ("auto", "triton"):
        compiled = torch.compile(
            lambda *tensors: ms_deform_attn(
                tensors[0],
                shapes,
                *tensors[1:],
                backend=backend,  # noqa: B023
            ),
            fullgraph=True,
            backend="aot_eager",
        )
        y = compiled(value, locations, weights)
        torch.testing.assert_close(
            y, ms_deform_attn(value, shapes, locations, weights, backend="grouped")
        )


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["grouped", "triton"])
def test_exports_with_any_number_of_tokens(backend):
    block = Block(backend)
    tokens = torch.export.Dim("tokens", min=64, max=4096)
    with torch.no_grad():
        program = torch.export.export(block, (torch.randn(70, DIM),), dynamic_shapes=[{0: tokens}])
        x = torch.randn(81, DIM)
        torch.testing.assert_close(program.module()(x), block(x))


def test_operator_checks_of_grouped():
    block, x = Block("grouped"), torch.randn(9, DIM, requires_grad=True)
    weights = (block.w1, block.b1, block.w2, block.b2)
    ids, gates = torch.randint(0, EXPERTS, (9, 2)), torch.rand(9, 2, requires_grad=True)
    for save_hidden in (False, True):
        torch.library.opcheck(grouped_op, (x, *weights, ids, gates, "relu", True, save_hidden))
    with torch.no_grad():
        _, *kept = grouped_op(x, *weights, ids, gates, "relu", True, True)
    inputs = [t.detach() for t in (torch.randn(9, DIM), x, *weights)]
    torch.library.opcheck(grouped_backward_op, (*inputs, ids, gates.detach(), *kept, "relu", True))
