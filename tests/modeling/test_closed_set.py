"""DINO with a closed vocabulary: names, heads, backbone; and that nothing else had to change."""

import copy
from pathlib import Path

import pytest
import torch
import torchvision
from detectron2.config import instantiate
from dynamic_dino.config import load_config
from dynamic_dino.data.class_names import class_vocabulary, count_classes
from dynamic_dino.data.synthetic.drawn import NAMES, write_drawn_dataset
from dynamic_dino.modeling.backbone import Backbone
from dynamic_dino.modeling.heads import LinearHead
from dynamic_dino.modeling.prompt import Prompt
from dynamic_dino.modeling.vocabulary import ClassVocabulary
from torch import nn

CONFIGS = Path(__file__).parents[2] / "configs"
CLASSES = ["red panda", "Windmill", "St. Bernard", "mug"]


def prompt(*phrases: str) -> Prompt:
    return Prompt.from_phrases(phrases)


@pytest.fixture(scope="module")
def _dino():
    model = instantiate(load_config(CONFIGS / "pretrain/dino_nano_drawn.py").model).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # nothing stays at zero, where mistakes would not show
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


@pytest.fixture
def dino(_dino):
    frozen = {id(p): p for p in _dino.parameters() if not p.requires_grad}
    return copy.deepcopy(_dino, frozen)


# The vocabulary ----------------------------------------------------------------------------------
def test_phrases_are_classes():
    vocabulary = ClassVocabulary(CLASSES)
    text = vocabulary([prompt("mug", "red panda"), prompt("WINDMILL"), prompt(*CLASSES)])
    assert text.tokens.shape == (3, 4, 0) and text.phrase_map.shape == (3, 4, 4)
    assert text.mask.tolist() == [
        [True, False, False, True],
        [False, True, False, False],
        [True] * 4,
    ]
    assert text.phrase_map[0].tolist() == [[0, 0, 0, 1], [1, 0, 0, 0], [0] * 4, [0] * 4]
    assert torch.equal(text.phrase_map[2], torch.eye(4))
    assert not list(vocabulary.parameters()) and not vocabulary.state_dict()


def test_prompts_are_padded_in_inference_only():
    vocabulary = ClassVocabulary(CLASSES).half()
    vocabulary.pad_to = 3
    asked = [prompt(*CLASSES)]
    assert vocabulary(asked).phrase_map.shape == (1, 4, 4)
    text = vocabulary.eval()(asked)
    assert text.phrase_map.shape == (1, 6, 4) and text.phrase_map.dtype == torch.float32
    assert text.mask.all() and (text.phrase_map[:, 4:] == 0).all()


def test_a_data_set_gives_the_names(tmp_path):
    path = str(write_drawn_dataset(tmp_path, 1, 64))
    assert class_vocabulary(path).names == list(NAMES)
    assert count_classes(path) == count_classes(NAMES) == 12


def test_long_prompts_are_split():
    vocabulary, asked = ClassVocabulary(CLASSES), prompt("mug", "red panda", "windmill")
    assert [p.prompt for p in vocabulary.chunks(asked)] == [asked]
    chunks = vocabulary.chunks(asked, 2)
    assert [(p.prompt.phrases, p.first) for p in chunks] == [
        (["mug", "red panda"], 0),
        (["windmill"], 2),
    ]


def test_wrong_names():
    vocabulary = ClassVocabulary(CLASSES)
    with pytest.raises(ValueError, match="'wind mill' is none of the 4 classes.*mean 'Windmill'"):
        vocabulary([prompt("mug", "wind mill")])
    with pytest.raises(ValueError, match="'xyz' is none of the 4 classes.*such as 'red panda'"):
        vocabulary([prompt("xyz")])
    with pytest.raises(ValueError, match="classes 0 and 2 are named 'mug' and 'Mug'"):
        ClassVocabulary(["mug", "cup", "Mug"])
    with pytest.raises(ValueError, match="names of its classes, but the list is empty"):
        ClassVocabulary([])
    with pytest.raises(ValueError, match="'a.png' has a caption, 'a mug on'.*its classes"):
        vocabulary.refuse_long_caption("a mug on", "a.png")


# The head ----------------------------------------------------------------------------------------
def test_linear_head():
    head, x = LinearHead(6, 5), torch.randn(2, 7, 6)
    assert torch.allclose(head.linear.bias.sigmoid(), torch.tensor(0.01), atol=1e-4)
    nn.init.normal_(head.linear.bias)
    mask = torch.tensor([[True] * 5, [True, False, True, True, False]])
    logits = head(x, torch.zeros(2, 5, 0), mask)
    wanted = torch.einsum("bqd,cd->bqc", x, head.linear.weight) + head.linear.bias
    torch.testing.assert_close(
        logits[mask[:, None].expand_as(logits)], wanted[mask[:, None].expand_as(logits)]
    )
    assert logits[1, :, [1, 4]].isneginf().all()
    with pytest.raises(ValueError, match="head has 5 classes, the vocabulary 4: set num_classes"):
        head(x, torch.zeros(2, 4, 0), mask[:, :4])


# The detector ------------------------------------------------------------------------------------
@torch.no_grad()
def test_the_order_of_the_prompt_does_not_matter(dino, draw):
    sample = draw(phrases=12)
    order = torch.randperm(12).tolist()
    other = sample | {"prompt": prompt(*(NAMES[i] for i in order))}
    first = sample | {"prompt": prompt(*NAMES)}
    a, b = (dino([s])[0]["instances"] for s in (first, other))
    torch.testing.assert_close(a.scores, b.scores)
    named = [{(p, *box) for p, box in zip(r.phrases, r.pred_boxes.tensor.tolist(), strict=True)}
             for r in (a, b)]  # fmt: skip
    assert len(named[0] & named[1]) > 90, "but for ties"


@torch.no_grad()
def test_only_what_is_asked_for_is_found(dino, draw):
    sample = draw(phrases=2, objects=False)
    found = dino([sample])[0]["instances"]
    assert set(found.phrases) <= set(sample["prompt"].phrases) and len(found) == 100
    dino.max_phrases = 1
    split = dino([sample])[0]["instances"]
    single = [sample | {"prompt": prompt(p)} for p in sample["prompt"].phrases]
    scores = torch.cat([dino([s])[0]["instances"].scores for s in single])
    torch.testing.assert_close(split.scores, scores.sort(descending=True).values[:100])


def test_classes_that_are_not_asked_for_do_not_train(dino, draw):
    samples = [draw(phrases=3), draw(phrases=3)]
    asked = {NAMES.index(p) for s in samples for p in s["prompt"].phrases}
    losses = dino.train()(samples)
    sum(v for k, v in losses.items() if k.startswith("loss")).backward()
    for weight in (
        dino.query_selection.class_head.linear.weight,
        dino.decoder.class_head.linear.weight,
        dino.denoising.content.weight,
    ):
        trained = set(weight.grad.abs().amax(1).nonzero().flatten().tolist())
        assert trained and trained <= asked
    missing = [n for n, p in dino.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


def test_look_forward_twice(dino, draw):
    """The gradient of a layer's boxes reaches the layer before, and no other (DINO, figure 6)."""
    decoder = dino.decoder
    heads = nn.ModuleList(copy.deepcopy(decoder.box_head) for _ in decoder.layers)
    decoder.box_head = heads
    with torch.no_grad():
        text = dino.text_encoder([prompt(*NAMES)])
        memory, text, _ = dino.enhancer(*dino.image_features([draw()]), text)
        queries, _ = dino.query_selection(memory, text)
    assert decoder.look_forward_twice
    boxes = {}
    for twice in (True, False):
        decoder.look_forward_twice = twice
        for normed in (True, False):
            decoder.refine_normed = normed
            for mode in (True, False):
                layers = decoder.train(mode)(queries, memory, text).layers
                boxes.setdefault(normed, []).append([p.boxes for p in layers])
                dino.zero_grad()
                layers[2].boxes.square().sum().backward()
                reached = [head.layers[-1].weight.grad is not None for head in heads]
                assert reached == [False, twice and mode, True]
    for runs in boxes.values():
        for run in runs[1:]:
            torch.testing.assert_close(run, runs[0])


# The backbone ------------------------------------------------------------------------------------
def test_frozen_modules_and_norms():
    options = dict(freeze_norm=True, frozen_modules=["conv1", "layer1"])
    backbone = Backbone("resnet18", **options).train()
    trained = {n for n, p in backbone.named_parameters() if p.requires_grad}
    parts = {n.split(".")[1] for n in trained}
    assert parts == {"layer2", "layer3", "layer4"}
    assert not any("bn" in n for n in trained) and len(trained) == 15
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(m.training for m in norms)
    maps = backbone(torch.randn(2, 3, 64, 64))
    sum(m.sum() for m in maps.values()).backward()
    with pytest.raises(ValueError, match="backbone 'resnet18' has no 'layer', only conv1, bn1"):
        Backbone("resnet18", frozen_modules=["layer"])


def test_torchvision_weights(tmp_path):
    """The file that torchvision publishes, with its classifier; an older one has no counters."""
    theirs = torchvision.models.resnet18(weights=None).eval()
    for norm in (m for m in theirs.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    state = theirs.state_dict()
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    x = torch.randn(1, 3, 70, 90)
    for weights in (state, old):
        torch.save(weights, tmp_path / "resnet.pth")
        backbone = Backbone("resnet18", str(tmp_path / "resnet.pth")).eval()
        with torch.no_grad():
            y = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
            y = theirs.layer1(y)
            for name, layer in (
                ("p3", theirs.layer2),
                ("p4", theirs.layer3),
                ("p5", theirs.layer4),
            ):
                y = layer(y)
                torch.testing.assert_close(backbone(x)[name], y, rtol=1e-4, atol=1e-4)
    torch.save(torchvision.models.resnet34(weights=None).state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth"):
        Backbone("resnet50", str(tmp_path / "other.pth"))


def test_weights_that_cannot_be_fetched():
    with pytest.raises(FileNotFoundError, match="'resnet18.tv_in1k'.*model.backbone.weights=/path"):
        Backbone("resnet18.tv_in1k", "timm")
