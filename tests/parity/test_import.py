"""Public weights become ours and go back; what is not the whole of a model is refused."""

import json
import re
import shutil

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from dynamic_dino.checkpoint import load_checkpoint, main
from dynamic_dino.checkpoint_import import IncompleteError, export_directory, import_public
from dynamic_dino.engine.config import load_config
from dynamic_dino.files import configs_folder
from dynamic_dino.transformers_config import detector_config, read_config
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForZeroShotObjectDetection, AutoTokenizer, BertConfig
from twins import random_samples, random_transformers_model, their_inputs

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


def idea_state(folder) -> dict[str, torch.Tensor]:
    """As a published .pth: joined projections, all copies of the box head, buffers, its prefix."""
    state, joined = {}, {}
    for name, value in load_file(folder / "model.safetensors").items():
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
    state.pop("backbone.0.swin.layernorm.weight"), state.pop("backbone.0.swin.layernorm.bias")
    state["backbone.0.layers.0.blocks.0.attn.relative_position_index"] = torch.arange(9)
    state["bert.embeddings.position_ids"] = torch.arange(512)[None]
    state["label_enc.weight"] = torch.randn(2001, 64)
    return {"module." + name: value for name, value in state.items()}


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
    assert kinds["missing"] == kinds["unexpected"] == "0" and kinds["unused"] == "2"
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
    with pytest.raises(ValueError, match=r"ogc.pth has the names of IDEA's code.*import .*ogc.pth"):
        load_checkpoint(gdino.ours, path)
    with pytest.raises(ValueError, match="has 16 channels, neither Swin-T's 96"):
        import_public(path)


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
    assert original.keys() - state.keys() == {k for k in original if "swin.layernorm" in k}


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
    refused(folder, "missing|unexpected|share one head")


def test_another_model(tmp_path):
    BertConfig().save_pretrained(tmp_path)
    refused(tmp_path, "is a bert model; what can be loaded are grounding-dino and mm-grounding")
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        (tmp_path / "empty").mkdir()
        import_public(tmp_path / "empty")
    torch.save({"a.weight": torch.zeros(2)}, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", "no weights of Grounding DINO .*a.weight")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated(damaged, share):
    folder, _ = damaged
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: int(len(content) * share)])
    refused(folder, "model.safetensors is corrupt or incomplete")


class Code:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return (print, ("this must never be printed",))


def test_pickled_code(damaged, capsys):
    folder, state = damaged
    (folder / "model.safetensors").unlink()
    torch.save({**state, "x": Code()}, folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin holds Python objects besides weights, which could run code")
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


@pytest.mark.parametrize("name", ["IDEA-Research/grounding-dino-tiny", "no/such/folder", "/none"])
def test_not_at_hand(name):
    """Tests are offline, as many machines are."""
    with pytest.raises(FileNotFoundError, match=name) as error:
        import_public(f"hf:{name}")
    assert ("hf download" in str(error.value)) == (name.count("/") == 1 and name[0] != "/")


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
