import pytest
import torch
from dynamic_dino_kernels import route
from dynamic_dino_kernels.moe.router import route_op

both = pytest.mark.parametrize("backend", ["grouped", "triton"])


def draw(tokens=37, dim=40, experts=10, dtype=torch.float32):
    x = torch.randn(tokens, dim, dtype=dtype, requires_grad=True)
    return x, torch.randn(experts, dim, requires_grad=True)


@both
@pytest.mark.parametrize("tokens, experts, k", [(37, 10, 2), (1, 1, 1), (64, 16, 4), (33, 7, 7)])
def test_matches_softmax_and_topk_in_float64(tokens, experts, k, backend):
    x, weight = draw(tokens, experts=experts)
    ids, gates, probs = route(x, weight, k, backend=backend)
    logits = x.double() @ weight.double().T
    top = logits.topk(k)
    assert ids.dtype == torch.int32 and torch.equal(ids.long(), top.indices)
    torch.testing.assert_close(gates.double(), top.values.softmax(-1) * k, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(probs.double(), logits.softmax(-1), rtol=1e-4, atol=1e-5)

    dgates, dprobs = torch.randn_like(gates), torch.randn_like(probs)
    grads = torch.autograd.grad((gates, probs), (x, weight), (dgates, dprobs))
    expected = torch.autograd.grad(
        (top.values.softmax(-1) * k, logits.softmax(-1)),
        (x, weight),
        (dgates.double(), dprobs.double()),
    )
    for grad, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-4)


@both
def test_siblings_tie_and_the_lowest_index_wins(backend):
    """As after MoE-Tuning's initialisation: groups of equal rows."""
    for dtype in (torch.float32, torch.float16):
        x, rows = draw(tokens=300, experts=4, dtype=dtype)
        for k in (1, 2, 4):
            ids, gates, probs = route(x, rows.repeat_interleave(k, 0), k, backend=backend)
            assert torch.equal(ids % k, torch.arange(k).expand_as(ids).int())
            assert (ids // k == ids[:, :1] // k).all() and (gates == 1).all()
            assert torch.equal(*(probs.unflatten(1, (4, k))[..., i] for i in (0, -1)))
    ids, _, _ = route(x * 0, rows * 0, 3, backend=backend)
    assert torch.equal(ids, torch.arange(3).expand_as(ids).int())


@both
def test_nan_tokens_still_go_to_distinct_experts(backend):
    x, weight = draw()
    with torch.no_grad():
        x[5, 3] = torch.nan
    ids, gates, probs = route(x, weight, 2, backend=backend)
    assert ids[5].tolist() == [0, 1]
    assert gates[5].isnan().all() and probs[5].isnan().all()
    assert gates[:5].isfinite().all() and gates[6:].isfinite().all()


@both
def test_no_tokens(backend):
    x, weight = draw(tokens=0)
    ids, gates, probs = route(x, weight, 2, backend=backend)
    assert ids.shape == gates.shape == (0, 2) and probs.shape == (0, 10)
    (gates.sum() + probs.sum()).backward()
    assert (weight.grad == 0).all()


@both
def test_runs_in_float32_under_autocast(backend, device):
    x, weight = draw()
    plain = route(x, weight, 2, backend=backend)
    with torch.autocast(device, torch.float16):
        low = route(x, weight, 2, backend=backend)
    for a, b in zip(plain, low, strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype


def test_operator_checks():
    torch.library.opcheck(route_op, (*draw(tokens=9), 2))


def test_errors_name_the_argument():
    x, weight = draw()
    with pytest.raises(ValueError, match=r"^tokens must be \[T, D\] and weight \[E, D\]"):
        route(x, weight[:, 1:], 2)
    with pytest.raises(ValueError, match="^top_k is 11, but must lie between 1 and E=10"):
        route(x, weight, 11)
