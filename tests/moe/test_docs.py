"""The router that docs/moe.md shows works as it is written there."""

import re
from pathlib import Path

import torch
from dynamic_dino.moe.layer import MoEFeedForward

PAGE = Path(__file__).parents[2] / "projects/DynamicDINO/docs/moe.md"


def test_router_of_the_page(ffn):
    [code] = re.findall(r"```python\n(import torch.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(code.strip().splitlines()) <= 24
    names = {}
    exec(compile(code, str(PAGE), "exec"), names)
    moe = MoEFeedForward(ffn.dim, ffn.hidden, router=names["NoisyRouter"](ffn.dim, 4))
    moe.load_state_dict(ffn.state)
    x = torch.randn(2, 30, ffn.dim)
    y, routing = moe(x)
    torch.testing.assert_close(y, ffn.module(x)[0], rtol=1e-4, atol=1e-4)
    assert len(routing.expert_ids.unique()) > 1
    assert moe.eval()(x)[1].expert_ids.tolist() == routing.probs.argmax(1, keepdim=True).tolist()
