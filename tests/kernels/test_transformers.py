"""Public mixtures of experts, tiny and random, run on `expert_ffn` as on their own loop."""

from types import SimpleNamespace

import pytest
import torch
from dynamic_dino_kernels.transformers import experts_forward, register
from helpers.processes import run_python
from torch import nn

transformers = pytest.importorskip("transformers", minversion="5.0")
from transformers.integrations.moe import (  # noqa: E402
    ALL_EXPERTS_FUNCTIONS,
    use_experts_implementation,
)

SIZES = dict(
    vocab_size=50,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=12,
    max_position_embeddings=64,
    pad_token_id=0,
)
MIXTRAL = transformers.MixtralConfig(**SIZES, num_local_experts=5, num_experts_per_tok=2)
QWEN = dict(moe_intermediate_size=12, num_experts=6, num_experts_per_tok=3)
QWEN2 = transformers.Qwen2MoeConfig(**SIZES, **QWEN, shared_expert_intermediate_size=16)
QWEN3 = transformers.Qwen3MoeConfig(**SIZES, **QWEN, hidden_act="gelu_pytorch_tanh")
GPT_OSS = transformers.GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
MODELS = {"Mixtral": MIXTRAL, "Qwen2-MoE": QWEN2, "Qwen3-MoE, tanh GELU": QWEN3}


@pytest.fixture(autouse=True)
def registered():
    register()
    yield
    ALL_EXPERTS_FUNCTIONS._global_mapping.pop("dynamic_dino", None)


def build(config):
    """With experts that matter: as they are drawn, their outputs would be lost in the sum."""
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name:
                parameter.mul_(10)
    return model.eval()


def run(model, tokens, implementation):
    model.set_experts_implementation(implementation)
    logits = model(tokens, use_cache=False).logits
    tensors = [p for p in model.parameters() if p.requires_grad]
    return logits, torch.autograd.grad(logits.sin().sum(), tensors, allow_unused=True)


@pytest.mark.parametrize("backend", ["grouped", "triton"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_eager(name, backend, monkeypatch):
    model, tokens = build(MODELS[name]), torch.randint(1, 50, (2, 9))
    expected, wants = run(model, tokens, "eager")
    monkeypatch.setenv("DYNAMIC_DINO_KERNELS", backend)
    calls = []
    monkeypatch.setattr(
        "dynamic_dino_kernels.transformers.expert_ffn",
        lambda *args, _ffn=experts_forward.__globals__["expert_ffn"], **options: (
            calls.append(options["activation"]) or _ffn(*args, **options)
        ),
    )
    logits, grads = run(model, tokens, "dynamic_dino")
    gated = "geglu_tanh" if "GELU" in name else "swiglu"
    assert calls == [gated] * 2
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert len(grads) == len(wants)
    for grad, want in zip(grads, wants, strict=True):
        assert (grad is None) == (want is None)
        if want is not None:
            assert (grad - want).norm() <= 1e-4 * want.norm() + 1e-5


def test_the_experts_are_what_the_logits_hang_on():
    """Else the comparison above would prove nothing."""
    model, tokens = build(MIXTRAL), torch.randint(1, 50, (2, 9))
    expected, _ = run(model, tokens, "dynamic_dino")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "down_proj" in name:
                parameter.zero_()
    assert (run(model, tokens, "dynamic_dino")[0] - expected).norm() > 0.1 * expected.norm()


def test_generates_the_same_tokens():
    model, tokens = build(QWEN2), torch.randint(1, 50, (2, 5))
    texts = []
    for implementation in ("eager", "dynamic_dino"):
        model.set_experts_implementation(implementation)
        texts.append(model.generate(tokens, max_new_tokens=6, do_sample=False))
    assert torch.equal(*texts)


def test_gpt_oss_is_refused_with_all_its_reasons():
    """Transposed, interleaved, and clamped: nothing of it fits."""
    model = build(GPT_OSS)
    model.set_experts_implementation("dynamic_dino")
    message = "GptOssExperts can't run .* transposed.* interleaves .* gates in a way of its own"
    with pytest.raises(ValueError, match=message):
        model(torch.randint(1, 50, (1, 4)))


TAKEN = {
    "deepseek_v2": "DeepseekV2Experts",
    "deepseek_v3": "DeepseekV3Experts",
    "ernie4_5_moe": "Ernie4_5_MoeExperts",
    "gemma4": "Gemma4TextExperts",
    "glm4_moe": "Glm4MoeExperts",
    "granitemoe": "GraniteMoeExperts",
    "jamba": "JambaExperts",
    "lfm2_moe": "Lfm2MoeExperts",
    "olmoe": "OlmoeExperts",
    "phimoe": "PhimoeExperts",
    "qwen3_next": "Qwen3NextExperts",
}
REFUSED = {
    "aria": ("AriaExperts", "its weights are transposed"),
    "deepseek_v4": ("DeepseekV4Experts", "gates in a way of its own"),
    "nemotron_h": ("NemotronHExperts", "its activation ReLUSquared.* is none of"),
    "openai_privacy_filter": ("OpenAIPrivacyFilterExperts", "its weights are transposed"),
}


def public_experts(model, name):
    """A model's experts, 5 of them, and a config with all the names that sizes go by."""
    module = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    config = SimpleNamespace(
        **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 5),
        **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), 10),
        **dict(hidden_size=12, hidden_act="silu", hidden_activation="gelu_pytorch_tanh"),
        **dict(moe_num_experts=5, swiglu_limit=7.0, swiglu_alpha=1.7, mlp_hidden_act="relu2"),
        **dict(moe_latent_size=None, _experts_implementation="dynamic_dino"),
    )
    experts = getattr(module, name)(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    ids = torch.rand(7, 5).argsort(1)[:, :2]
    return experts, config, (torch.randn(7, 12), ids, torch.rand(7, 2))


@pytest.mark.parametrize("model", TAKEN)
def test_experts_of_public_models(model):
    experts, config, arguments = public_experts(model, TAKEN[model])
    y = experts(*arguments)
    config._experts_implementation = "eager"
    expected = experts(*arguments)
    assert (y - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("model", REFUSED)
def test_experts_that_are_something_else(model):
    name, message = REFUSED[model]
    experts, _, arguments = public_experts(model, name)
    with pytest.raises(ValueError, match=message):
        experts(*arguments)


class Config:
    _experts_implementation = "dynamic_dino"


def experts(act_fn=None, gated=True, **layout):
    """A module as a transformers model would declare it, with its loop as the definition."""

    @use_experts_implementation(has_gate=gated, **layout)
    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts = 3
            self.act_fn = act_fn
            first, rows = ("gate_up_proj", 10) if gated else ("up_proj", 5)
            setattr(self, first, nn.Parameter(torch.randn(3, rows, 4)))
            setattr(self, f"{first}_bias", nn.Parameter(torch.randn(3, rows)))
            self.down_proj = nn.Parameter(torch.randn(3, 4, 5))
            self.down_proj_bias = nn.Parameter(torch.randn(3, 4))

        def forward(self, x, ids, gates):
            y = torch.zeros_like(x)
            for t, row in enumerate(ids.tolist()):
                for k, e in enumerate(row):
                    if e < 3:
                        z = self._first(x[t], e)
                        z = self.down_proj[e] @ z
                        if self.has_bias:
                            z = z + self.down_proj_bias[e]
                        y[t] += gates[t, k] * z
            return y

        def _first(self, x, e):
            first = "gate_up_proj" if self.has_gate else "up_proj"
            z = getattr(self, first)[e] @ x
            if self.has_bias:
                z = z + getattr(self, f"{first}_bias")[e]
            return self._apply_gate(z) if self.has_gate else self.act_fn(z)

    return Experts(Config())


def inputs(tokens=11, slots=2):
    ids = torch.rand(tokens, 3).argsort(1)[:, :slots]
    return torch.randn(tokens, 4), ids, torch.rand(tokens, slots)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_layouts_that_fit(gated, has_bias):
    module, arguments = experts(nn.SiLU(), gated, has_bias=has_bias), inputs()
    y = module(*arguments)
    module.config._experts_implementation = "eager"
    torch.testing.assert_close(y, module(*arguments), rtol=1e-4, atol=1e-4)


def test_other_ranks_experts_are_empty_slots():
    module, (x, ids, gates) = experts(nn.SiLU()), inputs()
    module._is_expert_parallel = True
    ids[torch.rand(ids.shape) < 0.5] = 3
    y = module(x, ids, gates)
    module.config._experts_implementation = "eager"
    torch.testing.assert_close(y, module(x, ids, gates), rtol=1e-4, atol=1e-4)


def test_compiles_without_a_graph_break():
    module, arguments = experts(nn.SiLU(), has_bias=True), inputs()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), module(*arguments))


def test_what_does_not_fit_is_refused():
    class Squared(nn.Module):
        pass

    class Own:
        def _apply_gate(self, gate_up):
            return gate_up.chunk(2, -1)[1]

    cases = [
        (experts(nn.SiLU(), is_transposed=True), "its weights are transposed"),
        (experts(nn.SiLU(), is_concatenated=False), "interleaves gate and up"),
        (experts(nn.SiLU(), has_post_expert_norm=True), "norms the output of every expert"),
        (experts(Squared()), r"its activation Squared\(\) is none of gelu, gelu_tanh, silu:"),
        (experts(nn.ReLU()), r"its activation ReLU\(\) is none of gelu, gelu_tanh, silu:"),
        (experts(Squared(), gated=False), "is none of gelu, gelu_tanh, relu, silu:"),
    ]
    for module, message in cases:
        with pytest.raises(ValueError, match=f"Experts can't run on expert_ffn.*{message}"):
            module(*inputs())
    own = experts(nn.SiLU())
    type(own)._apply_gate = Own._apply_gate
    with pytest.raises(ValueError, match="gates in a way of its own"):
        own(*inputs())


@pytest.mark.slow
def test_transformers_is_imported_on_demand_only():
    code = """
import sys, dynamic_dino_kernels.transformers as ours
assert "transformers" not in sys.modules
sys.modules["transformers"] = None
try:
    ours.register()
except ImportError as error:
    print(error)
"""
    done = run_python("-c", code)
    assert "pip install 'transformers>=5'" in done.stdout, done.stderr
