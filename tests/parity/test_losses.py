"""Losses and their gradients against transformers', on the same weights, images and targets.

Equal are the matching and all three terms of every decoder layer: focal loss over the real tokens
of the prompt, L1, GIoU, each summed and divided by the number of objects in the batch. Where the
two differ, ours does as the original:

- transformers takes the class logits of the query selection, and with them its matching, from the
  learned content of the queries, which every image shares, instead of from the selected tokens,
  and cuts the gradient of their boxes. Its criterion gives our values for the tokens.
- In a batch of images with different numbers of phrases, or of more than two, it looks up wrong
  phrases: the offset to those of image i is the number of phrases in image i, not in those before.
- Its weights are the matcher's 1, 5, 2 and 2, 5, 2 of Grounding DINO for both models, those of
  MM-Grounding-DINO are 2, 5, 2 and 1, 5, 2. Here terms are compared before they are weighted.
- Layers but the last are left out unless the config has auxiliary_loss=True.
"""

import re

import numpy as np
import torch
from dynamic_dino.checkpoint.public import Account, convert_weights
from dynamic_dino.checkpoint.weight_names import UNUSED, canonical_name
from dynamic_dino.modeling.structures import DetectorOutput, Target
from helpers.twins import as_transformers, clear_samples, their_inputs
from scipy.optimize import linear_sum_assignment
from transformers.loss.loss_grounding_dino import (
    GroundingDinoHungarianMatcher,
    GroundingDinoImageLoss,
)
from transformers.models.grounding_dino.modeling_grounding_dino import build_label_maps

CLOSE = dict(atol=1e-4, rtol=1e-4)
SIZES = (90, 101), (77, 120), (80, 88)
TERMS = {"loss_class": "loss_ce", "loss_bbox": "loss_bbox", "loss_giou": "loss_giou"}


def random_target(sample) -> Target:
    count = int(torch.randint(1, 5, ()))
    size = torch.rand(count, 2) * 0.6 + 0.1
    centre = size / 2 + torch.rand(count, 2) * (1 - size)
    labels = torch.randint(len(sample["prompt"].spans), (count,))
    return Target(torch.cat([centre, size], 1), labels)


def is_clear(cost: np.ndarray) -> bool:
    """Any other assignment costs more, by more than rounding; but for predictions that are alike,
    such as those of tokens that are unusable for the query selection."""
    rows, columns = linear_sum_assignment(cost)
    best = cost[rows, columns].sum()
    for row, column in zip(rows, columns, strict=True):
        other = cost.copy()
        other[np.abs(cost - cost[row]).max(1) < 1e-5, column] += 1e3
        if other[linear_sum_assignment(other)].sum() < best + 1e-3:
            return False
    return True


def clear_case(model, draw_samples) -> tuple[list[dict], DetectorOutput, list[Target]]:
    """Samples, what the model makes of them, and a `random_target` for each image, that both models
    match alike in each layer. Where two queries are nearly the same, no target is: draw again."""
    for _ in range(20):
        samples = draw_samples()
        output = encode(model, samples)
        targets = [clear_target(model, output, i, sample) for i, sample in enumerate(samples)]
        if None not in targets:
            return samples, output, targets
    raise AssertionError("no clear targets")


def clear_target(model, output, i: int, sample) -> Target | None:
    def is_clear_target(target: Target) -> bool:
        phrases = output.text.phrase_map[i : i + 1, target.labels]
        phrases = phrases / phrases.sum(-1, keepdim=True)
        for layer in [*output.layers, output.selection]:
            image = type(layer)(
                layer.logits[None, i : i + 1].detach(), layer.boxes[None, i : i + 1].detach()
            )
            cost = model.criterion.matcher._cost(image, target.boxes[None], phrases)
            if not is_clear(cost[0, 0].double().numpy()):
                return False
        return True

    drawn = (random_target(sample) for _ in range(50))
    return next((target for target in drawn if is_clear_target(target)), None)


def as_labels(targets: list[Target]) -> list[dict]:
    return [{"class_labels": t.labels, "boxes": t.boxes} for t in targets]


def our_losses(model, output, targets) -> dict[str, torch.Tensor]:
    """Before they are weighted."""
    weights = loss_weights(model)
    losses = model.criterion(output, targets)
    return {name: loss / weights["_".join(name.split("_")[:2])] for name, loss in losses.items()}


def loss_weights(model) -> dict[str, float]:
    return {name: getattr(model.criterion, name.replace("loss", "weight")) for name in TERMS}


def with_our_costs(twins):
    twins.theirs.config.class_cost = twins.ours.criterion.matcher.cost_class
    twins.theirs.config.auxiliary_loss = True
    return twins.theirs, twins.ours


def encode(model, samples):
    features, masks = model.image_features(samples)
    return model.decode(features, masks, model.text_encoder([s["prompt"] for s in samples]))


def alike_samples(twins, *sizes):
    """Prompts of as many phrases each, for which transformers finds the right ones."""
    while True:
        samples = clear_samples(twins, *sizes, phrases=(4, 4))
        if len({len(s["prompt"].spans) for s in samples}) == 1:
            return samples


@torch.no_grad()
def test_padded_batch(twins):
    theirs, model = with_our_costs(twins)
    model = as_transformers(model)
    sizes = (90, 101), (77, 120)
    samples, output, targets = clear_case(model, lambda: alike_samples(twins, *sizes))
    inputs = their_inputs(samples, model)
    expected = theirs(**inputs, labels=as_labels(targets))
    found = our_losses(model, output, targets)

    last = theirs.config.decoder_layers - 1
    suffixes = ["", *(f"_{i}" for i in range(last))]
    assert set(found) == {name + suffix for name in TERMS for suffix in (*suffixes, "_selection")}
    for ours, name in TERMS.items():
        for suffix in suffixes:
            wanted = expected.loss_dict[name + suffix]
            torch.testing.assert_close(found[ours + suffix], wanted, **CLOSE)

    # Their criterion, for the selected tokens.
    selected = expected.enc_outputs_class.amax(-1).topk(theirs.config.num_queries).indices
    logits = expected.enc_outputs_class.gather(
        1, selected[..., None].expand(-1, -1, expected.enc_outputs_class.shape[-1])
    )
    mask = torch.zeros_like(logits, dtype=torch.bool)
    mask[..., : inputs["attention_mask"].shape[1]] = inputs["attention_mask"][:, None].bool()
    matcher = GroundingDinoHungarianMatcher(theirs.config.class_cost, 5.0, 2.0)
    outputs = {
        "logits": logits,
        "pred_boxes": expected.encoder_pred_boxes,
        "label_maps": build_label_maps(logits, inputs["input_ids"]),
        "text_mask": mask,
    }
    criterion = GroundingDinoImageLoss(matcher, 0.25, ["labels", "boxes"])
    losses = criterion(outputs, as_labels(targets))
    for ours, name in TERMS.items():
        torch.testing.assert_close(found[f"{ours}_selection"], losses[name], **CLOSE)


@torch.no_grad()
def test_batch_is_the_sum_of_its_images(twins):
    """Prompts of several lengths; each image alone in transformers, all together here."""
    theirs, model = with_our_costs(twins)
    samples, output, targets = clear_case(model, lambda: clear_samples(twins, *SIZES))
    found = our_losses(model, output, targets)
    total = sum(len(target.labels) for target in targets)
    for ours, name in TERMS.items():
        expected = 0.0
        for sample, target in zip(samples, targets, strict=True):
            inputs = their_inputs([sample], model)
            losses = theirs(**inputs, labels=as_labels([target])).loss_dict
            expected = expected + losses[name] * len(target.labels) / total
        torch.testing.assert_close(found[ours], expected, **CLOSE)


def both_gradients(twins) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each parameter, ours and theirs, for the decoder layers' losses with our weights."""
    theirs, model = twins.theirs, twins.ours
    sizes = (90, 101), (77, 120)
    with torch.no_grad():
        samples, _, targets = clear_case(model, lambda: alike_samples(twins, *sizes))
    for each in (theirs, model):
        each.requires_grad_(True).zero_grad()
    losses = model.criterion(encode(model, samples), targets)
    sum(value for name, value in losses.items() if not name.endswith("_selection")).backward()
    expected = theirs(**their_inputs(samples, model), labels=as_labels(targets)).loss_dict
    weights = {TERMS[name]: weight for name, weight in loss_weights(model).items()}
    sum(
        weights[re.sub(r"_\d+$", "", name)] * value
        for name, value in expected.items()
        if not name.endswith("_enc") and "cardinality" not in name
    ).backward()

    gradients = {
        canonical_name(name): torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in theirs.named_parameters()
    }
    gradients = {name: g for name, g in gradients.items() if not UNUSED.search(name)}
    parameters = dict(model.named_parameters())
    converted = convert_weights(gradients, parameters, "transformers", Account(), "gradients")
    assert converted.keys() == parameters.keys()
    return [
        (torch.zeros_like(p) if p.grad is None else p.grad, converted[name])
        for name, p in parameters.items()
    ]


def test_gradients(twins):
    """Equal, unless rounding took one of the many ReLUs, or of the sampled points, to the other
    side of a bend: then other images are tried."""
    with_our_costs(twins)
    as_transformers(twins.ours)
    for _ in range(5):
        pairs = both_gradients(twins)
        largest = [float(wanted.abs().max()) for _, wanted in pairs]
        # Some gradients are sums that come to nothing but rounding, as those of keys' biases.
        limits = [1e-3 * size + 1e-5 * max(largest) for size in largest]
        assert sum(size > 1e-4 * max(largest) for size in largest) > 0.8 * len(pairs)
        errors = [float((found - wanted).abs().max()) for found, wanted in pairs]
        if all(error <= limit for error, limit in zip(errors, limits, strict=True)):
            return
    raise AssertionError("gradients differ")
