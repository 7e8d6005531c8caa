"""Public weights become ours and go back; what is not the whole of a model is refused."""

import json
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import LazyConfig, instantiate
from dynamic_dino.checkpoint.__main__ import main
from dynamic_dino.checkpoint.files import read_directory
from dynamic_dino.checkpoint.mmdetection_names import from_unfold
from dynamic_dino.checkpoint.public import (
    IncompleteError,
    export_directory,
    heads_differ,
    import_public,
    recipe_of,
)
from dynamic_dino.checkpoint.transformers_config import detector_config, read_config
from dynamic_dino.checkpoint.weight_names import UNUSED, canonical_name
from dynamic_dino.checkpoint.weights import load_checkpoint
from dynamic_dino.config import load_config
from dynamic_dino.files import configs_folder
from dynamic_dino.modeling.text import TextEncoder
from dynamic_dino.sources import model_directory
from helpers.twins import random_samples, random_transformers_model, their_inputs
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from timm.models.swin_transformer import PatchMerging
from transformers import (
    AutoModelForZeroShotObjectDetection,
    AutoTokenizer,
    BertConfig,
    MMGroundingDinoConfig,
)

# From transformers' names to those of IDEA's code, as its modules are called.
IDEA = [
    (r"^model\.text_backbone\.", "bert."),
    (r"^model\.text_projection\.", "feat_map."),
    (r"^model\.input_proj_vision\.", "input_proj."),
    (r"^model\.query_position_embeddings\.", "transformer.tgt_embed."),
    (r"^model\.encoder_output_bbox_embed\.", "transformer.enc_out_bbox_embed."),
    (r"^model\.(enc_output|level_embed)", r"transformer.\1"),
    (r"^model\.backbone\.conv_encoder\.model\.(encoder\.)?", "backbone.0."),
    (r"^(backbone\.0\.)embeddings\.patch_embeddings\.projection", r"\1patch_embed.proj"),
    (r"^(backbone\.0\.)embeddings\.norm", r"\1patch_embed.norm"),
    (r"(backbone.*)layernorm_before", r"\1norm1"),
    (r"(backbone.*)layernorm_after", r"\1norm2"),
    (r"(backbone.*)attention\.self\.relative", r"\1attn.relative"),
    (r"(backbone.*)attention\.self\.", r"\1attn."),
    (r"(backbone.*)attention\.output\.dense", r"\1attn.proj"),
    (r"(backbone.*)intermediate\.dense", r"\1mlp.fc1"),
    (r"(backbone.*)output\.dense", r"\1mlp.fc2"),
    (r"hidden_states_norms\.stage2", "norm1"),
    (r"hidden_states_norms\.stage3", "norm2"),
    (r"hidden_states_norms\.stage4", "norm3"),
    (r"^model\.encoder\.layers\.(\d+)\.fusion_layer\.", r"transformer.encoder.fusion_layers.\1."),
    (r"(fusion.*)layer_norm_vision", r"\1layer_norm_v"),
    (r"(fusion.*)layer_norm_text", r"\1layer_norm_l"),
    (r"(fusion.*)vision_param", r"\1gamma_v"),
    (r"(fusion.*)text_param", r"\1gamma_l"),
    (r"(fusion.*)vision_proj", r"\1v_proj"),
    (r"(fusion.*)text_proj", r"\1l_proj"),
    (r"^model\.encoder\.layers\.(\d+)\.text_enhancer_layer", r"transformer.encoder.text_layers.\1"),
    (r"(text_layers.*)layer_norm_before", r"\1norm1"),
    (r"(text_layers.*)layer_norm_after", r"\1norm2"),
    (r"^model\.encoder\.layers\.(\d+)\.deformable_layer", r"transformer.encoder.layers.\1"),
    (r"(encoder\.layers.*)self_attn_layer_norm", r"\1norm1"),
    (r"(encoder\.layers.*)final_layer_norm", r"\1norm2"),
    (r"^model\.decoder\.", "transformer.decoder."),
    (r"(decoder.*)encoder_attn_text_layer_norm", r"\1catext_norm"),
    (r"(decoder.*)encoder_attn_layer_norm", r"\1norm1"),
    (r"(decoder.*)self_attn_layer_norm", r"\1norm2"),
    (r"(decoder.*)final_layer_norm", r"\1norm3"),
    (r"(decoder.*)encoder_attn_text", r"\1ca_text"),
    (r"(decoder.*)encoder_attn\.", r"\1cross_attn."),
    (r"decoder\.layer_norm", "decoder.norm"),
    (r"reference_points_head", "ref_point_head"),
    (r"(coder.*)fc(1|2)", r"\1linear\2"),
]


def read_weights(folder) -> dict[str, torch.Tensor]:
    """Those that matter, whatever else a version of transformers writes."""
    state = load_file(folder / "model.safetensors")
    return {canonical_name(k): v for k, v in state.items() if not UNUSED.search(k)}


def idea_state(folder) -> dict[str, torch.Tensor]:
    """As a published .pth: joined projections, all copies of the box head, buffers, its prefix."""
    state, joined = {}, {}
    for name, value in read_weights(folder).items():
        for pattern, replacement in IDEA:
            name = re.sub(pattern, replacement, name)
        attention = re.fullmatch(r"((?:transformer|backbone).*)\.(query|key|value)\.(.*)", name)
        if attention:
            module, part, kind = attention.groups()
            joined.setdefault((module, kind), {})[part] = value
        else:
            state[name] = value
    for (module, kind), parts in joined.items():
        name = f"{module}.qkv.{kind}" if "backbone" in module else f"{module}.in_proj_{kind}"
        state[name] = torch.cat([parts[part] for part in ("query", "key", "value")])
    for name, value in list(state.items()):
        if name.startswith("bbox_embed.0."):
            for i in range(3):
                state[name.replace("0", str(i), 1)] = value
                state["transformer.decoder." + name.replace("0", str(i), 1)] = value
    state["backbone.0.layers.0.blocks.0.attn.relative_position_index"] = torch.arange(9)
    state["bert.embeddings.position_ids"] = torch.arange(512)[None]
    state["label_enc.weight"] = torch.randn(2001, 64)
    return {"module." + name: value for name, value in state.items()}


# From transformers' names to those of mmdetection.
MMDET = [
    (r"^model\.text_backbone\.", "language_model.language_backbone.body.model."),
    (r"^model\.text_projection\.", "text_feat_map."),
    (r"^model\.input_proj_vision\.3\.0\.", "neck.extra_convs.0.conv."),
    (r"^model\.input_proj_vision\.3\.1\.", "neck.extra_convs.0.gn."),
    (r"^model\.input_proj_vision\.(\d)\.0\.", r"neck.convs.\1.conv."),
    (r"^model\.input_proj_vision\.(\d)\.1\.", r"neck.convs.\1.gn."),
    (r"^model\.query_position_embeddings\.", "query_embedding."),
    (r"^model\.level_embed", "level_embed"),
    (r"^model\.enc_output\.", "memory_trans_fc."),
    (r"^model\.enc_output_norm\.", "memory_trans_norm."),
    (r"^model\.encoder_output_bbox_embed\.", "bbox_embed.3."),
    (r"^model\.encoder_output_class_embed\.", "class_embed.3."),
    (r"^class_embed\.(\d)\.", r"bbox_head.cls_branches.\1."),
    (r"^bbox_embed\.(\d)\.layers\.0\.", r"bbox_head.reg_branches.\1.0."),
    (r"^bbox_embed\.(\d)\.layers\.1\.", r"bbox_head.reg_branches.\1.2."),
    (r"^bbox_embed\.(\d)\.layers\.2\.", r"bbox_head.reg_branches.\1.4."),
    (r"^model\.backbone\.conv_encoder\.model\.(encoder\.)?", "backbone."),
    (r"^backbone\.embeddings\.patch_embeddings\.", "backbone.patch_embed."),
    (r"^backbone\.embeddings\.norm", "backbone.patch_embed.norm"),
    (r"^backbone\.layers", "backbone.stages"),
    (r"(^backbone.*)layernorm_before", r"\1norm1"),
    (r"(^backbone.*)layernorm_after", r"\1norm2"),
    (r"(^backbone.*)attention\.self\.", r"\1attn.w_msa."),
    (r"(^backbone.*)attention\.output\.dense", r"\1attn.w_msa.proj"),
    (r"(^backbone.*)intermediate\.dense", r"\1ffn.layers.0.0"),
    (r"(^backbone.*)output\.dense", r"\1ffn.layers.1"),
    (r"backbone\.hidden_states_norms\.stage2", "backbone.norm1"),
    (r"backbone\.hidden_states_norms\.stage3", "backbone.norm2"),
    (r"backbone\.hidden_states_norms\.stage4", "backbone.norm3"),
    (r"^model\.encoder\.layers\.(\d+)\.fusion_layer\.", r"encoder.fusion_layers.\1."),
    (r"(fusion.*)layer_norm_vision", r"\1layer_norm_v"),
    (r"(fusion.*)layer_norm_text", r"\1layer_norm_l"),
    (r"(fusion.*)vision_param", r"\1gamma_v"),
    (r"(fusion.*)text_param", r"\1gamma_l"),
    (r"(fusion.*)vision_proj", r"\1v_proj"),
    (r"(fusion.*)text_proj", r"\1l_proj"),
    (r"^model\.encoder\.layers\.(\d+)\.text_enhancer_layer", r"encoder.text_layers.\1"),
    (r"(text_layers.*)layer_norm_before", r"\1norms.0"),
    (r"(text_layers.*)layer_norm_after", r"\1norms.1"),
    (r"(text_layers.*)self_attn\.", r"\1self_attn.attn."),
    (r"^model\.encoder\.layers\.(\d+)\.deformable_layer", r"encoder.layers.\1"),
    (r"(encoder\.layers.*)self_attn_layer_norm", r"\1norms.0"),
    (r"(encoder\.layers.*)final_layer_norm", r"\1norms.1"),
    (r"^model\.decoder\.", "decoder."),
    (r"(decoder.*)encoder_attn_text_layer_norm", r"\1norms.1"),
    (r"(decoder.*)encoder_attn_layer_norm", r"\1norms.2"),
    (r"(decoder.*)self_attn_layer_norm", r"\1norms.0"),
    (r"(decoder.*)final_layer_norm", r"\1norms.3"),
    (r"(decoder.*)self_attn\.", r"\1self_attn.attn."),
    (r"(decoder.*)encoder_attn_text", r"\1cross_attn_text.attn"),
    (r"(decoder.*)encoder_attn\.", r"\1cross_attn."),
    (r"decoder\.layer_norm", "decoder.norm"),
    (r"reference_points_head", "ref_point_head"),
    (r"(coder.*)fc1", r"\1ffn.layers.0.0"),
    (r"(coder.*)fc2", r"\1ffn.layers.1"),
]


def to_unfold(weight: torch.Tensor) -> torch.Tensor:
    """Swin's four neighbours, (0, 0), (1, 0), (0, 1), (1, 1), in the order of torch's unfold."""
    neighbours = weight.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :]
    return neighbours.transpose(-1, -2).flatten(-2)


def mmdet_state(folder) -> dict[str, torch.Tensor]:
    """As a published .pth: joined projections, a box head for each layer, buffers."""
    source, state, joined = read_weights(folder), {}, {}
    for name in [name for name in source if name.startswith("bbox_embed.0.")]:
        for i in (1, 2):
            source.setdefault(name.replace("0", str(i), 1), source[name])
    for name, value in source.items():
        for pattern, replacement in MMDET:
            name = re.sub(pattern, replacement, name)
        attention = re.fullmatch(r"((?:en|de)coder.*|backbone.*)\.(query|key|value)\.(.*)", name)
        if attention:
            module, part, kind = attention.groups()
            joined.setdefault((module, kind), {})[part] = value
        else:
            state[name] = to_unfold(value) if "downsample" in name else value
    for (module, kind), parts in joined.items():
        name = f"{module}.qkv.{kind}" if "backbone" in module else f"{module}.in_proj_{kind}"
        state[name] = torch.cat([parts[part] for part in ("query", "key", "value")])
    state["backbone.stages.0.blocks.0.attn.w_msa.relative_position_index"] = torch.arange(9)
    state["dn_query_generator.label_embedding.weight"] = torch.randn(256, 64)
    return state


def config_file(config, tmp_path) -> str:
    """The config.yaml of a run with the shrunk model."""
    recipe = load_config(configs_folder() / "finetune/gdino_tiny_custom.py")
    recipe.model = config.model
    LazyConfig.save(recipe, str(tmp_path / "config.yaml"))
    return str(tmp_path / "config.yaml")


def same_weights(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_import_command(twins, tmp_path, capsys):
    out = tmp_path / "new" / "weights.safetensors"
    main(["import", f"hf:{twins.folder}", str(out)])
    printed = capsys.readouterr().out
    kinds = dict(re.findall(r"^(\w+) +(\d+)", printed, re.MULTILINE))
    total = len(twins.ours.state_dict())
    assert int(kinds["loaded"]) + int(kinds["converted"]) == total and int(kinds["converted"]) > 10
    assert kinds["missing"] == kinds["unexpected"] == "0"
    written = load_file(twins.folder / "model.safetensors")
    assert int(kinds["unused"]) == sum(bool(UNUSED.search(name)) for name in written) >= 2
    assert same_weights(load_file(out), twins.ours.state_dict())
    model = instantiate(import_public(twins.folder).config.model)
    load_checkpoint(model, out)
    assert same_weights(model.state_dict(), twins.ours.state_dict())


def test_recipes_start_from_public_weights(twins):
    """train.init_checkpoint=hf:..., without a file in between."""
    model = instantiate(detector_config(read_config(twins.folder)).model)
    load_checkpoint(model, f"hf:{twins.folder}")
    assert same_weights(model.state_dict(), twins.ours.state_dict())


def test_names_in_memory(twins, tmp_path):
    """A state dict of transformers 5, whose Swin has other names than in files."""
    path = tmp_path / "state.pth"
    torch.save(twins.theirs.state_dict(), path)
    imported = import_public(path, detector_config(read_config(twins.folder)))
    assert same_weights(imported.state, twins.ours.state_dict())
    assert imported.account.copies, "of the decoder's heads"


def test_checkpoints_of_ours(twins, tmp_path):
    """Of a run, with what the trainer stores besides."""
    path, config = tmp_path / "model_final.pth", detector_config(read_config(twins.folder))
    torch.save({"model": twins.ours.state_dict(), "iteration": 3}, path)
    imported = import_public(path, config)
    assert same_weights(imported.state, twins.ours.state_dict()) and not imported.account.converted
    config.model.decoder.num_layers = 4
    with pytest.raises(IncompleteError, match=r"missing \(decoder.layers.3"):
        import_public(path, config)


def test_names_of_ideas_code(gdino, tmp_path, capsys):
    path, out = tmp_path / "ogc.pth", tmp_path / "out.safetensors"
    torch.save({"model": idea_state(gdino.folder)}, path)
    config = config_file(detector_config(read_config(gdino.folder)), tmp_path)
    main(["import", str(path), str(out), "--config-file", config])
    assert re.search(r"copies +30\n?", capsys.readouterr().out)
    assert same_weights(load_file(out), gdino.ours.state_dict())
    with pytest.raises(ValueError, match=r"ogc.pth has the names of IDEA.*import .*ogc.pth"):
        load_checkpoint(gdino.ours, path)
    with pytest.raises(ValueError, match="has 16 channels, neither Swin-T's 96"):
        import_public(path)


def test_names_of_mmdetection(twins, tmp_path, capsys):
    path, out = tmp_path / "mm.pth", tmp_path / "out.safetensors"
    meta = {"epoch": 12, "dataset_meta": {"CLASSES": ("cat",)}}
    torch.save({"state_dict": mmdet_state(twins.folder), "meta": meta}, path)
    config = config_file(detector_config(read_config(twins.folder)), tmp_path)
    main(["import", str(path), str(out), "--config-file", config])
    kinds = dict(re.findall(r"^(\w+) +(\d+)", capsys.readouterr().out, re.MULTILINE))
    copies = 0 if twins.ours.decoder.box_head.__class__ is torch.nn.ModuleList else 2 * 6
    assert kinds["unused"] == "2" and kinds["copies"] == str(copies)
    assert same_weights(load_file(out), twins.ours.state_dict())
    with pytest.raises(ValueError, match=r"mm.pth has the names of .*mmdet.*import .*mm.pth"):
        load_checkpoint(twins.ours, path)


def test_heads_that_mmdetection_tuned(gdino, tmp_path):
    """Grounding DINO's layers share their box head; tuned by mmdetection they don't."""
    state = mmdet_state(gdino.folder)
    name = "bbox_head.reg_branches.1.4.bias"
    state[name] = state[name] + 1
    torch.save({"state_dict": state}, tmp_path / "tuned.pth")
    config = detector_config(read_config(gdino.folder))
    with pytest.raises(IncompleteError, match=r"1 unexpected \(bbox_embed.1.layers.2.bias\)"):
        import_public(tmp_path / "tuned.pth", config)
    config.model.decoder.separate_heads = True
    imported = import_public(tmp_path / "tuned.pth", config)
    instantiate(imported.config.model).load_state_dict(imported.state)
    assert torch.equal(imported.state["decoder.box_head.1.layers.4.bias"], state[name])


def test_incomplete_names_of_mmdetection(gdino, tmp_path):
    state = mmdet_state(gdino.folder)
    state["connector.weight"] = torch.zeros(2)
    del state["neck.extra_convs.0.conv.bias"]
    torch.save({"state_dict": state}, tmp_path / "mm.pth")
    with pytest.raises(
        IncompleteError, match=r"missing \(neck.layers.3.0.bias\); 1 unexpected \(connector.weight"
    ):
        import_public(tmp_path / "mm.pth", detector_config(read_config(gdino.folder)))


def test_patches_merged_by_unfold():
    """mmdetection's merging of patches and timm's give the same, by the converted weights."""
    channels, height, width = 5, 6, 8
    merging = PatchMerging(channels)
    for parameter in merging.parameters():
        torch.nn.init.normal_(parameter)
    theirs = {name: to_unfold(value) for name, value in merging.state_dict().items()}
    images = torch.randn(2, channels, height, width)
    patches = F.unfold(images, 2, stride=2).transpose(1, 2)
    normed = F.layer_norm(patches, (4 * channels,), theirs["norm.weight"], theirs["norm.bias"])
    expected = F.linear(normed, theirs["reduction.weight"])
    with torch.no_grad():
        for name, parameter in merging.named_parameters():
            parameter.copy_(from_unfold(theirs[name]))
        found = merging(images.permute(0, 2, 3, 1)).flatten(1, 2)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_recipe_by_the_weights():
    """A file says by its width and its heads what it is."""
    box = torch.randn(4)
    state = {
        "backbone.0.patch_embed.proj.bias": torch.zeros(128),
        "bbox_embed.0.layers.2.bias": box,
        "bbox_embed.1.layers.2.bias": box.clone(),
    }
    assert not heads_differ(state, "idea")
    assert heads_differ({**state, "bbox_embed.1.layers.2.bias": box + 1}, "idea")
    model = recipe_of(state, "idea", "x.pth").model
    assert model.backbone.name == "swin_base_patch4_window12_384"
    assert not model.decoder.class_head.scaled
    state["backbone.0.patch_embed.proj.bias"] = torch.zeros(96)
    state["transformer.enc_out_class_embed.bias"] = torch.zeros(1)
    model = recipe_of(state, "idea", "x.pth").model
    assert model.backbone.name == "swin_tiny_patch4_window7_224"
    assert model.decoder.class_head.scaled and model.decoder.separate_heads


@pytest.mark.parametrize("left", [["decoder_bbox_embed_share"], []], ids=["some", "none"])
def test_config_without_the_sharing_of_heads(_twins, tmp_path, left):
    """As older transformers wrote it; newer ones take heads as shared then."""
    folder = shutil.copytree(_twins["mm_gdino"].folder, tmp_path / "mm")
    config = json.loads((folder / "config.json").read_text())
    for name in ("decoder_bbox_embed_share", "decoder_cls_embed_share"):
        if name not in left:
            config.pop(name, None)
    (folder / "config.json").write_text(json.dumps(config))
    imported = import_public(folder)
    assert imported.config.model.decoder.separate_heads
    assert same_weights(imported.state, _twins["mm_gdino"].ours.state_dict())


def test_heads_of_layers_must_agree(gdino, tmp_path):
    state = idea_state(gdino.folder)
    name = "module.transformer.decoder.bbox_embed.1.layers.0.bias"
    state[name] = state[name] + 1
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(
        ValueError, match=r"x.pth: .*bbox_embed.1.layers.0.bias should be a copy of"
    ):
        import_public(tmp_path / "x.pth", detector_config(read_config(gdino.folder)))


@torch.no_grad()
def test_export_and_back(twins, tmp_path):
    folder = tmp_path / "model"
    export_directory(twins.ours, folder)
    theirs = AutoModelForZeroShotObjectDetection.from_pretrained(folder).eval()
    assert type(theirs) is type(twins.theirs)
    inputs = their_inputs(random_samples((64, 80)), twins.ours)
    one, other = theirs(**inputs), twins.theirs(**inputs)
    assert torch.equal(one.logits, other.logits) and torch.equal(one.pred_boxes, other.pred_boxes)
    again = import_public(folder)
    assert same_weights(again.state, twins.ours.state_dict())
    same, first = again.config.model, detector_config(read_config(twins.folder), folder).model
    assert OmegaConf.to_yaml(same.decoder) == OmegaConf.to_yaml(first.decoder)
    text = "a red panda. windmill."
    ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert ids == twins.ours.text_encoder.tokenizer(text)["input_ids"]


def test_export_command(gdino, tmp_path, capsys):
    config = config_file(detector_config(read_config(gdino.folder)), tmp_path)
    main(["export", "--config-file", config, f"hf:{gdino.folder}", str(tmp_path / "hf")])
    assert "hf: " in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
    } <= names
    state, original = (load_file(f / "model.safetensors") for f in (tmp_path / "hf", gdino.folder))
    assert original.keys() - state.keys() == {k for k in original if UNUSED.search(k)}


def test_text_encoder_with_weights_of_its_own(tmp_path):
    """A recipe whose text encoder brings its weights: the directory's take their place."""
    recipe = load_config(configs_folder() / "finetune/gdino_nano_custom.py")
    model = instantiate(recipe.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    export_directory(model, tmp_path)
    for config in (None, recipe):
        assert same_weights(import_public(tmp_path, config).state, model.state_dict())
    other = instantiate(recipe.model)
    load_checkpoint(other, f"hf:{tmp_path}")
    assert same_weights(other.state_dict(), model.state_dict()) and other.text_encoder.frozen


def test_edge_has_no_twin(tmp_path):
    model = instantiate(load_config(configs_folder() / "pretrain/nano_drawn.py").model)
    with pytest.raises(ValueError, match="only the full Grounding DINO variant"):
        export_directory(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# What is refused ---------------------------------------------------------------------------------
@pytest.fixture
def damaged(gdino, tmp_path):
    """A copy of the directory, and its weights, to be changed."""
    folder = tmp_path / "damaged"
    shutil.copytree(gdino.folder, folder)
    return folder, load_file(folder / "model.safetensors")


def refused(folder, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        import_public(folder)


def test_missing_and_renamed(damaged, capsys):
    folder, state = damaged
    state["model.decoder.layers.0.fc9.bias"] = state.pop("model.decoder.layers.0.fc1.bias")
    save_file(state, folder / "model.safetensors")
    refused(folder, r"1 missing \(decoder.layers.0.ffn.linear1.bias\); 1 unexpected .*fc9.bias")
    with pytest.raises(SystemExit) as error:
        main(["import", str(folder), str(folder / "out.safetensors")])
    printed = capsys.readouterr()
    assert error.value.code == 2 and re.search(r"missing +1 +decoder.layers.0", printed.out)
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert not (folder / "out.safetensors").exists()


def test_other_sizes(damaged):
    folder, _ = damaged
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "decoder_ffn_dim": 64}))
    refused(folder, r"9 of other shapes \(model.decoder.layers.0.fc1.weight \[128, 64\] for")
    (folder / "config.json").write_text(json.dumps({**config, "decoder_layers": 2}))
    refused(folder, "unexpected")
    (folder / "config.json").write_text(json.dumps({**config, "activation_function": "gelu"}))
    refused(folder, "activation_function='gelu', only 'relu' fits")


def test_families_are_not_mixed_up(twins, tmp_path):
    """Grounding DINO has no bias, MM-Grounding-DINO one for each head."""
    folder = shutil.copytree(twins.folder, tmp_path / "mixed")
    config = json.loads((folder / "config.json").read_text())
    other = {"grounding-dino": "mm-grounding-dino", "mm-grounding-dino": "grounding-dino"}
    config["model_type"] = other[config["model_type"]]
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "missing|unexpected")


def test_another_model(tmp_path):
    BertConfig().save_pretrained(tmp_path)
    refused(tmp_path, "is a bert model; what can be loaded are grounding-dino and mm-grounding")
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        (tmp_path / "empty").mkdir()
        import_public(tmp_path / "empty")
    torch.save({"a.weight": torch.zeros(2)}, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", "no weights of Grounding DINO .*a.weight")


@pytest.mark.parametrize(
    ("share", "why"),
    [(0.0, "empty: fetch it again"), *((share, "corrupt or incomplete") for share in (0.3, 0.99))],
)
def test_truncated(damaged, share, why):
    folder, _ = damaged
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: int(len(content) * share)])
    refused(folder, f"model.safetensors is {why}")


class Code:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return (print, ("this must never be printed",))


def test_pickled_code(damaged, capsys):
    folder, state = damaged
    (folder / "model.safetensors").unlink()
    torch.save({**state, "x": Code()}, folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin holds .* besides weights, which could run code")
    assert "never" not in capsys.readouterr().out
    torch.save(state, folder / "pytorch_model.bin")
    assert import_public(folder).state
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor pytorch_model.bin"):
        import_public(folder)


def test_weights_in_parts(damaged, gdino):
    folder, state = damaged
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    parts = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same_weights(import_public(folder).state, gdino.ours.state_dict())


@pytest.mark.parametrize("elsewhere", ["../other.safetensors", "/etc/passwd", "sub/a.bin", 3, ""])
def test_an_index_points_nowhere_else(tmp_path, elsewhere):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": elsewhere}}))
    with pytest.raises(ValueError, match=r"index.json names .*which is no file beside it"):
        read_directory(tmp_path)
    for damage in ("{", "[]", '{"weight_map": [3]}'):
        index.write_text(damage)
        with pytest.raises(ValueError, match=r"index.json is no index of weights"):
            read_directory(tmp_path)


def test_code_that_a_model_brings_is_never_run(twins, tmp_path, monkeypatch):
    """transformers asks for leave where it isn't told, and runs it at "y"."""
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    ran, folder = tmp_path / "ran", tmp_path / "model"
    shutil.copytree(twins.folder, folder)
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    brought = {"auto_map": {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **brought}))
    assert same_weights(import_public(folder).state, twins.ours.state_dict())
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", **brought}))
    refused(folder, "is a evil model; what can be loaded are grounding-dino")
    with pytest.raises(ValueError, match="code that a model brings is never run"):
        TextEncoder(str(folder), weights=False)
    assert not ran.exists()


@pytest.mark.parametrize("name", ["IDEA-Research/grounding-dino-tiny", "no/such/folder", "/none"])
def test_not_at_hand(name):
    """Tests are offline, as many machines are."""
    with pytest.raises(FileNotFoundError, match=name) as error:
        import_public(f"hf:{name}")
    assert ("hf download" in str(error.value)) == (name.count("/") == 1 and name[0] != "/")


def test_a_revision_is_that_of_the_hub(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(name, revision=None, allow_patterns=()):
        asked.append((name, revision))
        (tmp_path / "model.safetensors").touch()
        return tmp_path

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    for spec in ("hf:a/b.c", "hf:a/b.c@v1.0", "hf:a/b.c@refs/pr/7"):
        assert model_directory(spec) == tmp_path
    assert asked == [("a/b.c", None), ("a/b.c", "v1.0"), ("a/b.c", "refs/pr/7")]
    for spec in ("hf:a/b@", "hf:../b", "hf:@v1", "hf:a/b c"):
        with pytest.raises(FileNotFoundError, match="no directory, and no id of the Hugging Face"):
            model_directory(spec)


@pytest.mark.skipif(
    not hasattr(MMGroundingDinoConfig(), "decoder_cls_embed_share"), reason="transformers 4"
)
def test_shared_heads_of_mm_grounding_dino(tmp_path):
    """transformers has them too, though no published model does."""
    model = random_transformers_model(
        "mm_gdino", decoder_bbox_embed_share=True, decoder_cls_embed_share=True
    )
    model.save_pretrained(tmp_path)
    imported = import_public(tmp_path)
    assert not imported.config.model.decoder.separate_heads
    instantiate(imported.config.model).load_state_dict(imported.state)


def test_incomplete_error_has_the_account(damaged):
    folder, state = damaged
    del state["model.level_embed"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(IncompleteError) as error:
        import_public(folder)
    assert error.value.account.missing == ["enhancer.level_embed"]
