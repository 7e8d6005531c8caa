"""The detectors that benchmarks compare: a recipe's, dense and as experts, with random towers.

Speed and operations don't depend on the weights, so nothing is downloaded. The mixture of experts
is converted from the dense model's weights, as MoE-Tuning starts, so both give the same boxes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.structures import Boxes, Instances
from dynamic_dino.config import load_config, without_downloads
from dynamic_dino.modeling.feed_forward import FeedForward
from dynamic_dino.modeling.prompt import Prompt
from dynamic_dino.moe.experts import Experts
from dynamic_dino.moe.layer import MoEFeedForward
from dynamic_dino.moe.routing import Routing
from dynamic_dino_kernels import route
from omegaconf import DictConfig
from torch import Tensor, nn

from lib.moe_peers import Room, looped_ffn

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "configs/moe_tuning/dynamic_dino_x16_top2.py"  # Edge with 16 experts, the paper's model
# Ten of COCO's names; the cost of a prompt depends on its length, not on its words.
NAMES = "person. bicycle. car. traffic light. dog. backpack. umbrella. sports ball. cup. chair."

COCO_NAMES = [category["name"] for category in COCO_CATEGORIES if category["isthing"]]


def load_model_config(path: str = RECIPE, overrides: Sequence[str] = ()) -> DictConfig:
    """The model of a recipe, with random towers where its own would have to be downloaded."""
    return without_downloads(load_config(ROOT / path, list(overrides)).model)


def dense_of(model: DictConfig, wide: bool = False) -> DictConfig:
    """The same model with a dense FFN in place of each mixture of experts; `wide`: with as many
    units as all its experts have together."""
    model = copy.deepcopy(model)

    def replace(node: DictConfig) -> None:
        for key, child in node.items():
            if not isinstance(child, DictConfig):
                continue
            if child.get("_target_") in (MoEFeedForward, _name_of(MoEFeedForward)):
                units = instantiate(child).experts.b1.numel() if wide else child.hidden
                node[key] = L(FeedForward)(
                    dim=child.dim, hidden=units, **({"widen": True} if wide else {})
                )
            else:
                replace(child)

    replace(model)
    return model


def _name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def build(model: DictConfig, device: str = "cpu", like: nn.Module | None = None) -> nn.Module:
    """The detector, for inference; with the weights of `like`, converted if that is dense."""
    detector = instantiate(model).eval().to(device)
    if like is not None:
        detector.load_state_dict(like.state_dict())
    return detector.requires_grad_(False)


def use_backend(detector: nn.Module, backend: str) -> nn.Module:
    """Makes all experts of a detector run on one back-end."""
    for module in detector.modules():
        if isinstance(module, Experts):
            module.backend = backend
    return detector


class LoopedExperts(nn.Module):
    """The same experts, run by the paper's loop, see `looped_ffn`. Inference only.

    room  rows of each expert's chunk; None: the next call decides, and waits for the device
    """

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        if experts.activation != "relu":
            raise ValueError(
                f"the loop is written for ReLU, but the experts' activation is "
                f"{experts.activation!r}: leave out the candidate"
            )
        self.w1, self.b1, self.w2, self.b2 = experts.w1, experts.b1, experts.w2, experts.b2
        self.room: Room | None = None

    def forward(self, x: Tensor, routing: Routing, norm: nn.LayerNorm | None = None) -> Tensor:
        """x [T, D] -> y [T, D], or norm(x + y)"""
        ids = routing.expert_ids
        if self.room is None:
            self.room = Room.for_routing(ids, len(self.w1))
        y = looped_ffn(x, self.w1, self.b1, self.w2, self.b2, ids, routing.gates, self.room)
        return y if norm is None else norm(x + y)

    def with_router(
        self,
        x: Tensor,
        norm: nn.LayerNorm | None = None,
        *,
        router: Tensor,
        top_k: int,
        weighted: bool,
    ) -> tuple[Tensor, Routing]:
        """As `Experts.with_router`, which a detector on CUDA calls, but in two steps."""
        ids, gates, probs, _ = route(x, router, top_k)
        routing = Routing(ids, gates if weighted else None, probs)
        return self.forward(x, routing, norm), routing


def use_loop(detector: nn.Module) -> nn.Module:
    """Makes all experts of a detector run as the paper's loop."""
    for module in list(detector.modules()):
        for name, child in module.named_children():
            if isinstance(child, Experts):
                setattr(module, name, LoopedExperts(child))
    return detector


def loops(detector: nn.Module) -> list[LoopedExperts]:
    return [module for module in detector.modules() if isinstance(module, LoopedExperts)]


def samples(
    size: tuple[int, int], batch: int = 1, names: str = NAMES, device: str = "cpu"
) -> list[dict]:
    """Noise of the given height and width as a batch for the detector, on its device."""
    height, width = size
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "image": torch.randint(
                256, (3, height, width), generator=generator, dtype=torch.uint8
            ).to(device),
            "image_size": size,
            "height": height,
            "width": width,
            "prompt": Prompt.parse(names),
        }
        for _ in range(batch)
    ]


def training_batch(size: int, batch: int, names: int, boxes: int) -> list[dict]:
    """Square images of noise with random boxes and labels, as `TrainMapper` gives them.

    Args:
        names: how many of COCO's names are in the prompt; boxes: how many are in an image.
    """
    found = samples((size, size), batch, ". ".join(COCO_NAMES[:names]))
    generator = torch.Generator().manual_seed(0)
    for sample in found:
        corner, extent = torch.rand(2, boxes, 2, generator=generator)
        corner = 0.7 * corner
        instances = Instances(sample["image_size"])
        instances.gt_boxes = Boxes(torch.cat([corner, corner + 0.05 + 0.25 * extent], 1) * size)
        instances.gt_classes = torch.randint(names, (boxes,), generator=generator)
        sample["instances"] = instances
    return found
