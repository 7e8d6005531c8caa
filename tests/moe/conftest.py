"""Two dense detectors with random heads, nano and a shrunken Edge, and what their towers give."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from dynamic_dino.config import load_config
from dynamic_dino.modeling.prompt import Prompt
from dynamic_dino.moe.layer import MoEFeedForward
from dynamic_dino.moe.routers import SoftmaxRouter
from torch import nn

CONFIGS = Path(__file__).parents[2] / "configs"


def small_edge():
    """Edge's parts, all of them, at a size for tests."""
    model = LazyConfig.load(str(CONFIGS / "common/models/edge_random.py")).model
    model.backbone.name = "efficientvit_b0.r224_in1k"
    model.text_encoder.config = dict(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    model.enhancer.in_channels = [32, 64, 128]
    model.enhancer.num_layers = 2
    model.enhancer.layer.image.ffn.hidden = 128
    model.enhancer.cross_scale.block.depth = 1
    model.query_selection.num_queries = QUERIES
    model.decoder.num_layers = 3
    model.decoder.layer.ffn.hidden = 256
    model.canvas = 128
    return model


# So few that no two scores come near each other: rounding must not decide which query is which.
QUERIES = 25


class Dense:
    """A dense detector, its config, and the input of everything behind its towers."""

    def __init__(self, config) -> None:
        self.config, self.model = config, instantiate(config).eval()
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.requires_grad:  # nothing stays at zero, where mistakes don't show
                    parameter.add_(torch.randn_like(parameter), alpha=0.02)
            prompts = ["red circle. blue square. windmill.", "green triangle. old steam engine."]
            self.batch = [
                {
                    "image": torch.randint(0, 256, (3, *size), dtype=torch.uint8),
                    "image_size": size,
                    "height": size[0],
                    "width": size[1],
                    "prompt": Prompt.parse(prompt),
                }
                for size, prompt in zip([(128, 128), (96, 128)], prompts, strict=True)
            ]
            self._normalise()
            self.features, self.masks = self.model.image_features(self.batch)
            self.text = self.model.text_encoder([s["prompt"] for s in self.batch])
            self.output = self.decode(self.model)

    def _normalise(self) -> None:
        """Random networks fade out what they see, unless batch norm has its statistics."""
        norms = [m for m in self.model.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        self.model.train()
        text = self.model.text_encoder([s["prompt"] for s in self.batch])
        self.model.decode(*self.model.image_features(self.batch), text)
        self.model.eval()

    def decode(self, model):
        with torch.no_grad():
            return model.decode(self.features, self.masks, self.text)

    def with_experts(self, load: bool = True, enhancer: bool = False, **options):
        """A copy that shares the towers and has experts for FFNs; MoE-tuned from this one."""
        dense = self.model
        shared = (dense.backbone, dense.text_encoder)
        model = copy.deepcopy(dense, {id(tower): tower for tower in shared})
        config = copy.deepcopy(self.config)
        config.decoder.layer.ffn = experts(config.decoder.layer.ffn, **options)
        model.decoder = instantiate(config.decoder)
        if enhancer:
            config.enhancer.layer.image.ffn = experts(config.enhancer.layer.image.ffn, **options)
            model.enhancer = instantiate(config.enhancer)
        if load:
            model.load_state_dict(dense.state_dict())
        return model.eval()


def experts(dense, router=None, **options):
    """`options`: of the softmax router, where no other is given"""
    router = router or L(SoftmaxRouter)(dim=dense.dim, **options)
    return L(MoEFeedForward)(dim=dense.dim, hidden=dense.hidden, router=router)


@pytest.fixture(scope="session")
def nano():
    model = load_config(CONFIGS / "pretrain/nano_drawn.py").model
    model.query_selection.num_queries = QUERIES
    return Dense(model)


@pytest.fixture(scope="session")
def edge():
    return Dense(small_edge())


@pytest.fixture(scope="session", params=["nano", "edge"])
def dense(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def ffn():
    """A dense FFN of 12 channels and 24 hidden units."""
    from dynamic_dino.modeling.feed_forward import FeedForward

    result = FeedForward(dim=12, hidden=24)
    for parameter in result.parameters():
        torch.nn.init.normal_(parameter)
    return SimpleNamespace(module=result, state=result.state_dict(), dim=12, hidden=24)
