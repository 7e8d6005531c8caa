"""Repeated calls launch what the first one launched, on the pointers of their own tensors.

Triton's interpreter has no compiled kernels to repeat, so this runs on the pretended GPU of the
benchmarks, in a process of its own; on a machine with a GPU also for real.
"""

import os
from pathlib import Path

import pytest
import torch
from dynamic_dino_kernels import expert_ffn, moe_block, ms_deform_attn, route
from dynamic_dino_kernels.moe import ops
from helpers.processes import run_python

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def on_the_pretended_gpu(code: str, cache: Path) -> str:
    """Where nothing is launched, kernels need no machine code."""
    head = f"import sys\nsys.path.insert(0, {str(BENCHMARKS)!r})\n"
    head += "from helpers.compiler import leave_out_machine_code\n"
    head += "leave_out_machine_code(memory=False)\n"
    done = run_python("-c", head + code, env=os.environ | {"TRITON_CACHE_DIR": str(cache)})
    assert done.returncode == 0, done.stderr
    return done.stdout


COMPARE = """
import torch
from lib.pretended_gpu import Launches, pretend
pretend("{target}")
from dynamic_dino_kernels import expert_ffn, moe_block, ms_deform_attn, route, route_any
from dynamic_dino_kernels.moe import ops, router
from dynamic_dino_kernels.moe.tiles import Tiles, pinned_tiles
from dynamic_dino_kernels.deform_attn import ops as deform

def addresses(value):
    return value.data_ptr() if isinstance(value, torch.Tensor) else value

def watched(call):
    Launches.kept = []
    result = call()
    kept, Launches.kept = Launches.kept, None
    return result, [(name, grid, [addresses(a) for a in args]) for name, grid, args in kept]

def tensors(*values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors(*value)

def check(function, draw):
    '''Three calls on tensors of their own: the first is observed, the others repeat it.'''
    seen = []
    for _ in range(3):
        given = draw()
        result, launches = watched(lambda: function(*given))
        known = {{t.data_ptr(): f"given {{i}}" for i, t in enumerate(given)}}
        known |= {{t.data_ptr(): f"result {{i}}" for i, t in enumerate(tensors(result))}}
        assert launches
        rows = []
        for name, grid, args in launches:
            row = []
            for a in args:
                # What lies between is named by the order in which it is first met. Numbers that
                # count something are small.
                if type(a) is int and a > 2**24 and a not in known:
                    known[a] = f"between {{len(known)}}"
                row.append(known.get(a, a) if type(a) is int else repr(a))
            rows.append((name, grid, row))
        seen.append(([(t.shape, t.dtype) for t in tensors(result)], rows))
        keep.append((given, result))
    # The first call gives the compiler's constants, which a repeated launch needn't.
    for later in seen[1:]:
        assert later[0] == seen[0][0]
        for (n1, g1, r1), (n2, g2, r2) in zip(seen[0][1], later[1], strict=True):
            assert (n1, g1) == (n2, g2), (n1, n2)
            assert len(r1) == len(r2)
            for one, two in zip(r1, r2):
                assert one == two or one in ("None", 0) or two in ("None", 0), (n1, r1, r2)
                if str(one).startswith(("given", "result", "between")):
                    assert one == two, (n1, r1, r2)

keep = []
D, H, E, K, heads = 64, 96, 5, 3, 4
f16 = torch.float16
weights = lambda: (torch.randn(E, H, D).half(), torch.randn(E, H).half(),
                   torch.randn(E, D, H).half(), torch.randn(E, D).half())
norm = lambda: (torch.randn(D), torch.randn(D))

def block(weighted, normed):
    def run(x, r, *w):
        *w, scale, shift = w
        n = (scale, shift, 1e-5) if normed else None
        return moe_block(x, r, *w, top_k=K, weighted=weighted, norm=n)
    return run

def ffn(x, ids, *w):
    return expert_ffn(x, *w, ids, None)

def swiglu(x, ids, w1, w2):
    return expert_ffn(x, w1, None, w2, None, ids, None, activation="swiglu")

gated = lambda: (torch.randn(E, 2 * H, D).half(), torch.randn(E, D, H).half())

with torch.no_grad():
    for tokens in (1, 33, 3000):  # the last is merged by place_slots
        for weighted in (False, True):
            for normed in (False, True):
                check(block(weighted, normed), lambda: (
                    torch.randn(tokens, D).half(), torch.randn(E, D), *weights(), *norm()))
        ids = lambda: torch.randint(0, E, (tokens, K), dtype=torch.int32)
        check(ffn, lambda: (torch.randn(tokens, D).half(), ids(), *weights()))
        check(swiglu, lambda: (torch.randn(tokens, D).half(), ids(), *gated()))
        check(lambda x, w: route(x, w, K), lambda: (torch.randn(tokens, D), torch.randn(E, D)))
        check(lambda x, w, g: route_any(x, w, g, max_k=K, fallback=True), lambda: (
            torch.randn(tokens, D), torch.randn(E, D), torch.zeros(E)))
    with pinned_tiles(Tiles("two_gemms")):
        check(ffn, lambda: (torch.randn(40, D).half(), torch.zeros(40, K).int(), *weights()))
        check(swiglu, lambda: (torch.randn(40, D).half(), torch.zeros(40, K).int(), *gated()))
    levels = [(4, 5), (2, 3)]
    check(lambda v, l, w: ms_deform_attn(v, levels, l, w), lambda: (
        torch.randn(1, 26, heads, 8).half(), torch.rand(1, 7, heads, 2, 4, 2),
        torch.rand(1, 7, heads, 2, 4)))
every = (ops._block, ops._ffn, router._route, router._route_any, deform._sample)
for replayed in every:
    assert None not in replayed._recordings.values()
print(*(len(replayed._recordings) for replayed in every))
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80"])
def test_repeated_calls_launch_the_same_on_their_own_pointers(target, tmp_path):
    found = on_the_pretended_gpu(COMPARE.format(target=target), tmp_path)
    assert found.split() == ["12", "8", "3", "3", "1"]


REFUSED = """
import torch
from lib.pretended_gpu import pretend
pretend("sm_90")
from dynamic_dino_kernels.moe import ops
from torch.utils._python_dispatch import TorchDispatchMode

def draw():
    return [torch.randn(*s) for s in ((9, 32), (4, 32), (4, 16, 32), (4, 16), (4, 32, 16), (4, 32))]

def found(args=None):
    return ops.find_block(*(args or draw()), 2, True, "relu", None) is not None

class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))

print(found())  # gradients might be wanted
with torch.no_grad():
    print(found())
    torch.set_autocast_enabled("cuda", True)
    print(found())
    torch.set_autocast_enabled("cuda", False)
    with Mode():
        print(found())
    for place, change in (
        (0, lambda t: torch.randn(9, 64)[:, ::2]),      # not contiguous
        (2, lambda t: torch.randn(4 * 16 * 32 + 1)[1:].view(4, 16, 32)),  # not aligned
        (0, lambda t: t[:0]),                            # nothing to do
        (1, lambda t: t.to("meta")),                     # elsewhere
    ):
        args = draw()
        args[place] = change(args[place])
        print(found(args))
"""


@pytest.mark.slow
def test_what_cant_be_repeated_is_dispatched(tmp_path):
    answers = on_the_pretended_gpu(REFUSED, tmp_path).split()
    assert answers == ["False", "True", *["False"] * 6]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 900, 3601])
def test_repeated_calls_on_the_gpu(tokens, dtype):
    """Fresh tensors at each call, on two streams, and from a graph: as the two calls apart."""
    shapes = [(16, 256), (16, 1024, 256), (16, 1024), (16, 256, 1024), (16, 256)]
    weights = [(torch.randn(s) * s[-1] ** -0.5).to(dtype) for s in shapes]
    norm = torch.randn(256), torch.randn(256), 1e-5

    def both(x):
        ids, gates, _, blocks = route(x, weights[0], 2)
        apart = expert_ffn(x, *weights[1:], ids, gates, norm=norm, blocks=blocks)
        return moe_block(x, *weights, top_k=2, norm=norm)[0], apart

    with torch.no_grad():
        for i in range(4):
            stream = torch.cuda.Stream() if i % 2 else torch.cuda.current_stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                one, apart = both(torch.randn(tokens, 256).to(dtype))
            stream.synchronize()
            torch.testing.assert_close(one, apart)
        x = torch.randn(tokens, 256).to(dtype)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            one, apart = both(x)
        for _ in range(3):
            x.copy_(torch.randn(tokens, 256))
            graph.replay()
            torch.testing.assert_close(one, apart)
    assert ops._block._recordings and None not in ops._block._recordings.values()
    value = torch.randn(1, 26, 4, 8, dtype=dtype)
    points = torch.rand(1, 7, 4, 2, 4)
    locations = torch.rand(*points.shape, 2)
    exact = ms_deform_attn(value.double(), [(4, 5), (2, 3)], locations, points, backend="grouped")
    with torch.no_grad():
        for _ in range(3):
            y = ms_deform_attn(value, [(4, 5), (2, 3)], locations, points)
            torch.testing.assert_close(y.double(), exact, rtol=0.02, atol=0.02)
