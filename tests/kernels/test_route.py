import pytest
import torch
from dynamic_dino_kernels import expert_ffn, route, route_any
from dynamic_dino_kernels.moe.plan import sort_in_blocks
from dynamic_dino_kernels.moe.router import route_any_op, route_op

both = pytest.mark.parametrize("backend", ["grouped", "triton"])


def draw(tokens=37, dim=40, experts=10, dtype=torch.float32):
    x = torch.randn(tokens, dim, dtype=dtype, requires_grad=True)
    return x, torch.randn(experts, dim, requires_grad=True)


@both
@pytest.mark.parametrize("tokens, experts, k", [(37, 10, 2), (1, 1, 1), (64, 16, 4), (33, 7, 7)])
def test_matches_softmax_and_topk_in_float64(tokens, experts, k, backend):
    x, weight = draw(tokens, experts=experts)
    ids, gates, probs, _ = route(x, weight, k, backend=backend)
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


@pytest.mark.slow
@both
def test_siblings_tie_and_the_lowest_index_wins(backend):
    """As after MoE-Tuning's initialisation: groups of equal rows."""
    for dtype in (torch.float32, torch.float16):
        x, rows = draw(tokens=300, experts=4, dtype=dtype)
        for k in (1, 2, 4):
            ids, gates, probs, _ = route(x, rows.repeat_interleave(k, 0), k, backend=backend)
            assert torch.equal(ids % k, torch.arange(k).expand_as(ids).int())
            assert (ids // k == ids[:, :1] // k).all() and (gates == 1).all()
            assert torch.equal(*(probs.unflatten(1, (4, k))[..., i] for i in (0, -1)))
    ids = route(x * 0, rows * 0, 3, backend=backend).expert_ids
    assert torch.equal(ids, torch.arange(3).expand_as(ids).int())


@both
def test_nan_tokens_still_go_to_distinct_experts(backend):
    x, weight = draw()
    with torch.no_grad():
        x[5, 3] = torch.nan
    ids, gates, probs, _ = route(x, weight, 2, backend=backend)
    assert ids[5].tolist() == [0, 1]
    assert gates[5].isnan().all() and probs[5].isnan().all()
    assert gates[:5].isfinite().all() and gates[6:].isfinite().all()


@both
def test_no_tokens(backend):
    x, weight = draw(tokens=0)
    ids, gates, probs, _ = route(x, weight, 2, backend=backend)
    assert ids.shape == gates.shape == (0, 2) and probs.shape == (0, 10)
    (gates.sum() + probs.sum()).backward()
    assert (weight.grad == 0).all()


@both
def test_runs_in_float32_under_autocast(backend, device):
    x, weight = draw()
    plain = route(x, weight, 2, backend=backend)
    with torch.autocast(device, torch.float16):
        low = route(x, weight, 2, backend=backend)
    for a, b in zip(plain[:3], low[:3], strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype


@pytest.mark.slow
def test_operator_checks():
    torch.library.opcheck(route_op, (*draw(tokens=9), 2))
    x, weight = draw(tokens=9, experts=4)
    thresholds = torch.randn(4).requires_grad_()
    torch.library.opcheck(route_any_op, (x, weight, thresholds, 4, True))


# Top-any gating


def any_by_definition(x, weight, thresholds, max_k, fallback):
    """Token by token and in float64: ids, and gates and scores with straight-through gradients."""
    x, weight = x.double(), weight.double()
    cosine = (x @ weight.T) / x.norm(dim=1, keepdim=True) / weight.norm(dim=1)
    scores, limits = cosine.sigmoid(), thresholds.double().sigmoid()
    ids, gates = [], torch.zeros(len(x), max_k, dtype=torch.float64)
    for t in range(len(x)):
        best_first = sorted(range(len(weight)), key=lambda e: (-cosine[t, e].item(), e))
        chosen = [e for e in best_first if scores[t, e] > limits[e]]
        if fallback and not chosen:
            chosen = [e for e in best_first if thresholds[e] < torch.inf][:1]
        chosen = chosen[:max_k]
        ids.append(chosen + [-1] * (max_k - len(chosen)))
        for slot, e in enumerate(chosen):
            margin = scores[t, e] - limits[e]
            gates[t, slot] = (1 + margin - margin.detach()) / len(chosen)
    gates = gates + 0 * scores[:, :1] - 0 * limits[:1]  # of the graph even if nothing was chosen
    return torch.tensor(ids, dtype=torch.int32).reshape(len(x), max_k), gates, scores


@both
@pytest.mark.parametrize("fallback", [False, True])
@pytest.mark.parametrize("experts, max_k", [(6, 6), (6, 2), (1, 1), (16, 16)])
def test_any_takes_every_expert_beyond_its_threshold(experts, max_k, fallback, backend):
    x, weight = draw(tokens=45, dim=12, experts=experts)
    thresholds = torch.randn(experts) * 0.2 + 0.3  # so that many tokens reach none
    thresholds[experts // 2] = torch.inf if experts > 1 else 0.9
    thresholds.requires_grad_()
    args = (x, weight, thresholds)
    routed = route_any(*args, max_k=max_k, fallback=fallback, backend=backend)
    ids, gates, scores = any_by_definition(*args, max_k, fallback)
    assert torch.equal(routed.expert_ids, ids)
    assert not fallback or (ids[:, 0] >= 0).all()
    torch.testing.assert_close(routed.gates.double(), gates, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(routed.probs.double(), scores, rtol=1e-5, atol=1e-6)
    dgates, dscores = torch.randn_like(gates), torch.randn_like(scores)
    grads = torch.autograd.grad(
        (routed.gates, routed.probs), args, (dgates.float(), dscores.float())
    )
    wants = torch.autograd.grad((gates, scores), args, (dgates, dscores))
    for grad, want in zip(grads, wants, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-5)


@both
def test_any_with_nothing_on_and_with_nothing_to_route(backend):
    x, weight = draw()
    off = torch.full((10,), torch.inf)
    ids, gates, _, _ = route_any(x, weight, off, fallback=True, backend=backend)
    assert (ids == -1).all() and (gates == 0).all()
    ids, gates, probs, _ = route_any(x[:0], weight, off, backend=backend)
    assert ids.shape == gates.shape == probs.shape == (0, 10)


@both
def test_any_with_thresholds_of_minus_infinity_takes_the_best(backend):
    """How k is forced: every expert that isn't switched off would do, and the best k are taken."""
    x, weight = draw()
    thresholds = torch.full((10,), -torch.inf)
    thresholds[3] = torch.inf
    cosine = torch.nn.functional.cosine_similarity(x[:, None], weight[None], dim=-1)
    best = cosine.masked_fill(thresholds == torch.inf, -2).sort(1, descending=True).indices
    for k in (1, 4, 10):
        ids, gates, _, _ = route_any(x, weight, thresholds, max_k=k, backend=backend)
        filled = min(k, 9)
        assert torch.equal(ids[:, :filled].long(), best[:, :filled])
        assert (ids[:, filled:] == -1).all()
        torch.testing.assert_close(gates[:, :filled], torch.full((37, filled), 1 / filled))
        grads = torch.autograd.grad(gates.sum(), (x, weight), allow_unused=True)
        assert all(grad.isfinite().all() for grad in grads)


@both
def test_any_gives_a_nan_token_nothing_or_one_expert(backend):
    x, weight = draw()
    with torch.no_grad():
        x[5, 3] = torch.nan
    thresholds = torch.zeros(10)
    thresholds[0] = torch.inf
    ids = route_any(x, weight, thresholds, max_k=3, backend=backend).expert_ids
    assert ids[5].tolist() == [-1, -1, -1]
    ids = route_any(x, weight, thresholds, max_k=3, fallback=True, backend=backend).expert_ids
    assert ids[5].tolist() == [1, -1, -1]


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 100])
def test_blocks_are_those_of_the_plan(tokens):
    x, weight = draw(tokens=tokens, experts=5)
    for routed in (
        route(x, weight, 3, backend="triton"),
        route_any(x, weight, torch.zeros(5), max_k=4, backend="triton"),
    ):
        ids = routed.expert_ids
        blocks = sort_in_blocks(ids, 5)
        assert torch.equal(routed.blocks, blocks)
        for row, chosen in zip(blocks.tolist(), ids.split(32), strict=True):
            starts, slots = row[:6], row[6:]
            for e, (start, end) in enumerate(zip(starts, starts[1:], strict=False)):
                assert [ids.flatten()[slot].item() for slot in slots[start:end]] == [e] * (
                    chosen == e
                ).sum().item()
            assert set(slots[starts[5] :]) <= {-1}


def test_blocks_of_other_tokens_are_refused():
    x, weight = draw(tokens=70, dim=8, experts=3)
    blocks = route(x[:30], weight, 2, backend="triton").blocks
    ids, gates, _, _ = route(x, weight, 2, backend="triton")
    experts = [torch.randn(size) for size in ((3, 4, 8), (3, 4), (3, 8, 4), (3, 8))]
    with pytest.raises(ValueError, match="^blocks .* other ids than these of T=70"):
        expert_ffn(x, *experts, ids, gates, blocks=blocks, backend="triton")


def test_errors_name_the_argument():
    x, weight = draw()
    with pytest.raises(ValueError, match=r"^tokens must be \[T, D\] and weight \[E, D\]"):
        route(x, weight[:, 1:], 2)
    with pytest.raises(ValueError, match="^top_k is 11, but must lie between 1 and E=10"):
        route(x, weight, 11)
    with pytest.raises(ValueError, match="^max_k is 0, but must lie between 1 and E=10"):
        route_any(x, weight, torch.zeros(10), max_k=0)
    with pytest.raises(ValueError, match=r"^thresholds must be \[E=10\]"):
        route_any(x, weight, torch.zeros(9))
