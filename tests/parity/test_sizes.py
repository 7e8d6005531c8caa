"""The recipes are of the published sizes; on the meta device, nothing is computed."""

import pytest
import torch
import transformers
from detectron2.config import LazyConfig, instantiate
from dynamic_dino.checkpoint.public import Account, convert_weights
from dynamic_dino.checkpoint.transformers_config import detector_config
from dynamic_dino.checkpoint.weight_names import UNUSED, canonical_name
from dynamic_dino.files import configs_folder
from helpers.twins import FAMILIES, SEPARATE

SWIN = {
    "tiny": {},
    "base": dict(embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], window_size=12),
}


def published(family: str, size: str) -> transformers.PretrainedConfig:
    """transformers' defaults, which are the tiny model's, and the backbone of config.json."""
    swin = transformers.SwinConfig(**SWIN[size], out_indices=[2, 3, 4])
    options = SEPARATE if family == "mm_gdino" else {}
    return FAMILIES[family][0](backbone_config=swin, **options)


def shapes(config) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {k: v.shape for k, v in instantiate(config.model).state_dict().items()}


@pytest.mark.parametrize(("family", "size"), [("gdino", "base"), ("mm_gdino", "tiny")])
def test_recipe_is_the_published_model(family, size):
    recipe = LazyConfig.load(str(configs_folder() / f"common/models/{family}_{size}.py"))
    assert shapes(recipe) == shapes(detector_config(published(family, size)))


def test_every_published_weight_has_its_place():
    with torch.device("meta"):
        theirs = FAMILIES["gdino"][1](published("gdino", "tiny"))
        recipe = LazyConfig.load(str(configs_folder() / "common/models/gdino_tiny.py"))
        ours = instantiate(recipe.model)
    state = {canonical_name(k): v for k, v in theirs.state_dict().items()}
    unused = {k for k in state if UNUSED.search(k)}
    copies = {k for k in state if k.startswith("bbox_embed.") and not k.startswith("bbox_embed.0.")}
    account = Account()
    rest = {k: v for k, v in state.items() if k not in unused | copies}
    convert_weights(rest, ours.state_dict(), "transformers", account, "tiny")
    assert unused and len(copies) == 5 * 6
    total = sum(p.numel() for p in ours.parameters())
    named = {canonical_name(name): p for name, p in theirs.named_parameters()}
    assert total == sum(p.numel() for name, p in named.items() if not UNUSED.search(name))
    assert total == pytest.approx(172.2e6, abs=0.1e6)
