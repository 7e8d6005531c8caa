"""The graph that is exported finds what the detector finds, of every kind of model; untraced here,
and read back as an exported file is."""

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from dynamic_dino.data.synthetic.drawn import NAMES
from dynamic_dino.export.check import Tolerance, compare, difference, generated_images
from dynamic_dino.export.detector import Source, _graph, _returned, text_slots
from dynamic_dino.export.graph import TextGraph
from dynamic_dino.modeling.prompt import Prompt
from dynamic_dino.moe.hierarchical import HierarchicalRouter
from dynamic_dino.moe.layer import MoEFeedForward
from dynamic_dino.moe.part_router import PartRouter
from dynamic_dino.moe.routers import SoftmaxRouter
from dynamic_dino.moe.top_any import TopAnyRouter
from dynamic_dino.serving.exported import Exported, ExportedText, ExportInfo
from dynamic_dino.serving.inference import Detector

CONFIGS = Path(__file__).parents[2] / "configs/common/models"
FILE = Path("/folder/of/the/server/x.onnx")
ALLOWED = Tolerance(2e-4, 0.98, 0.0)
ROUTERS = {
    "x16": lambda d: SoftmaxRouter(d, 16, 2, std=1.0),
    "parts": lambda d: PartRouter(d, 16, 2, std=1.0),
    "himoe": lambda d: HierarchicalRouter(d, 8, 2, std=1.0),
    "dynmoe": lambda d: TopAnyRouter(d, 4),
}


def eager(graph):
    """An exported file's run, by PyTorch."""

    def run(feed):
        with torch.no_grad():
            outputs = graph(**{name: torch.from_numpy(value) for name, value in feed.items()})
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return [output.numpy() for output in outputs]

    return run


def read_back(source, tokenizer=None, batch=1, experts="tiles"):
    graph, inputs = _graph(source, experts, batch)
    info = ExportInfo(
        "nano",
        None if source.slots else source.prompt.phrases,
        source.size,
        _returned(graph, inputs),
        batch,
        list(inputs),
        0.0,
        text=source.slots,
    )
    text = None
    if source.slots:
        encoder = source.model.text_encoder
        encoder.tokenizer.backend_tokenizer.save(str(tokenizer))
        text = ExportedText(eager(TextGraph(encoder)), source.slots, tokenizer)
    info = ExportInfo.from_json(info.to_json(), "memory")
    return Detector(Exported(eager(graph), info, FILE, text), info.size, threshold=0.0)


def source_of(model, size, prompt, slots=None):
    model.canvas, model.return_routings = size, False
    return Source(model.eval(), "nano", size, prompt, slots, 0.0, None, None)


def with_experts(model, make):
    for layer in model.decoder.layers:
        dense = layer.ffn
        dim, hidden = dense.linear2.out_features, dense.linear1.out_features
        layer.ffn = MoEFeedForward(dim, hidden, make(dim))
        layer.ffn.load_state_dict(dense.state_dict())
        for parameter in layer.ffn.parameters():
            if parameter.dim() == 3:  # copies part
                parameter.data += 0.02 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("kind", ROUTERS)
def test_every_kind_of_experts(kind, nano):
    prompt = Prompt.from_phrases(list(NAMES[:5]))
    source = source_of(with_experts(nano, ROUTERS[kind]), 128, prompt)
    found = compare(source.detector(), read_back(source), generated_images(128, 2), prompt, ALLOWED)
    assert found.within(ALLOWED) and found.detections == 200, found


def test_more_names_than_fit_and_several_images_at_once(nano):
    nano.max_phrases, nano.max_detections = 5, 70
    source = source_of(nano, 128, Prompt.from_phrases(list(NAMES)))
    exported, images = read_back(source, batch=2), generated_images(128, 3)
    ours, theirs = source.detector()(images, list(NAMES)), exported(images)
    for a, b in zip(ours, theirs, strict=True):
        assert difference(a, b, ALLOWED).within(ALLOWED)
        # Which names a random network finds among 70 depends on the seed.
        assert len(b) == 70 and set(b.phrases) == set(a.phrases) and set(b.phrases) & set(NAMES[5:])
    # `serve` sends what these say to its clients: the file's name alone is in it.
    with pytest.raises(ValueError, match="^x.onnx finds the 12.*'red circle'.*not 'dog'.*text-in"):
        exported(images[0], ["dog"])
    with pytest.raises(ValueError, match="^x.onnx returns 70 .*not 99: .* --max-detections 99"):
        exported(images[0], max_detections=99)
    with pytest.raises(ValueError, match="of 9 x 160 pixels doesn't fit .* of 128 of x.onnx"):
        exported.model([{"image": torch.zeros(3, 9, 160), "prompt": Prompt.from_phrases(NAMES)}])
    assert len(exported(images[0], max_detections=9)) == 9


def test_text_as_an_input(nano, tmp_path):
    slots = text_slots(nano.text_encoder, 6, None)
    nano.max_phrases, nano.max_detections = slots.phrases, 40
    source = source_of(nano, 128, Prompt.from_phrases(["cow"]), slots)
    exported = read_back(source, tmp_path / "tokenizer.json", batch=2)
    for names in (["cow"], list(NAMES), ["St. Bernard", "old café"]):
        found = compare(
            source.detector(),
            exported,
            generated_images(128, 1),
            Prompt.from_phrases(names),
            ALLOWED,
        )
        assert found.within(ALLOWED), found
    with pytest.raises(ValueError, match="nothing to look for"):
        exported(np.zeros((9, 9, 3), np.uint8))


def test_closed_set_and_grounding_dino(tmp_path):
    closed = LazyConfig.load(str(CONFIGS / "dino_nano.py"))
    closed.model.text_encoder.names = ["cat", "dog", "cow"]
    for class_head in (closed.model.decoder, closed.model.query_selection):
        class_head.class_head.num_classes = 3
    closed.model.denoising = closed.model.criterion = None
    prompt = Prompt.from_phrases(["cat", "dog", "cow"])
    source = source_of(instantiate(closed.model), 96, prompt)
    images = [np.array(image[:70]) for image in generated_images(96, 1)]
    found = compare(source.detector(), read_back(source), images, prompt, ALLOWED)
    assert found.within(ALLOWED) and found.detections == 100, found

    open_text = LazyConfig.load(str(CONFIGS / "gdino_nano.py"))
    open_text.model.criterion = open_text.model.denoising = None
    model = instantiate(open_text.model)
    source = source_of(model, 96, prompt, text_slots(model.text_encoder, 16, None))
    model.max_phrases, model.text_encoder.max_tokens = 7, 16
    exported = read_back(source, tmp_path / "tokenizer.json", None)
    names = Prompt.from_phrases(["cat", "red panda", "St. Bernard", "old café", "dog"])
    found = compare(source.detector(), exported, images, names, ALLOWED)
    assert found.within(ALLOWED), found
