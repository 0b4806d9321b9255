"""CLIP text encoders against transformers and open_clip."""

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from clip_oracles import CAPTIONS, TINY, clip_text, randomized, relative_error, transformers_ids
from safetensors.torch import save_file
from torch.testing import assert_close
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ldm.conditioners import CLIPText

VOCABULARY = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": None}


@pytest.fixture(scope="module")
def oracle() -> CLIPTextModelWithProjection:
    return randomized(CLIPTextModelWithProjection(CLIPTextConfig(**TINY, **VOCABULARY)), seed=1)


def loaded(oracle: CLIPTextModelWithProjection, **settings: Any) -> CLIPText:
    encoder = CLIPText(TINY, pooled=True, **settings)
    encoder.load_state_dict({f"transformer.{name}": tensor for name, tensor in oracle.state_dict().items()})
    return encoder


@torch.no_grad()
def test_the_defaults_are_stable_diffusion_1s(oracle: CLIPTextModelWithProjection) -> None:
    """Last hidden state with the final norm, padded with the end token, of 77 tokens whatever the caption."""
    cond = loaded(oracle)({"caption": CAPTIONS})
    expected = oracle(input_ids=transformers_ids(CAPTIONS))
    assert cond.mask is None
    assert relative_error(cond.context, expected.last_hidden_state) < 1e-5
    assert relative_error(cond.vector, expected.text_embeds) < 1e-5


@pytest.mark.parametrize("layer", [0, 1, 2, 3, -1, -2])
@torch.no_grad()
def test_a_layer_is_that_hidden_state_without_norm_or_with(oracle: CLIPTextModelWithProjection, layer: int) -> None:
    hidden = oracle(input_ids=transformers_ids(CAPTIONS), output_hidden_states=True).hidden_states[layer]
    normed = oracle.text_model.final_layer_norm(hidden)
    for final_norm, expected in ((False, hidden), (True, normed)):
        cond = loaded(oracle, layer=layer, final_norm=final_norm)({"caption": CAPTIONS})
        assert relative_error(cond.context, expected) < 1e-5


@torch.no_grad()
def test_the_context_is_that_of_open_clips_implementation() -> None:
    """An implementation of its own: fused attention weights, masks and activations."""
    encoder = clip_text()
    model = open_clip.transformer.TextTransformer(
        77, 49408, 32, 4, 3, mlp_ratio=2.0, output_dim=None, act_layer=open_clip.transformer.QuickGELU
    )
    state = {name.removeprefix("transformer.text_model."): t for name, t in encoder.state_dict().items()}
    model.token_embedding.weight.copy_(state["embeddings.token_embedding.weight"])
    model.positional_embedding.copy_(state["embeddings.position_embedding.weight"])
    model.ln_final.load_state_dict({kind: state[f"final_layer_norm.{kind}"] for kind in ("weight", "bias")})
    for i, block in enumerate(model.transformer.resblocks):
        names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
        names |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
        for theirs, ours in names.items():
            part = {kind: state[f"encoder.layers.{i}.{ours}.{kind}"] for kind in ("weight", "bias")}
            block.get_submodule(theirs).load_state_dict(part)
        for kind in ("weight", "bias"):
            fused = torch.cat([state[f"encoder.layers.{i}.self_attn.{name}_proj.{kind}"] for name in "qkv"])
            getattr(block.attn, f"in_proj_{kind}").copy_(fused)
    model.output_tokens, model.text_projection = True, None
    ids = transformers_ids(CAPTIONS)
    assert relative_error(encoder({"caption": CAPTIONS}).context, model.eval()(ids)[1]) < 1e-5


@pytest.mark.parametrize("pooled", [False, True])
def test_state_names_are_those_of_compvis_files(pooled: bool) -> None:
    names = set(clip_text(pooled=pooled).state_dict())
    towers = {name for name in names if name.startswith("transformer.text_model.")}
    assert "transformer.text_model.embeddings.token_embedding.weight" in towers
    assert "transformer.text_model.encoder.layers.2.self_attn.q_proj.weight" in towers
    assert "transformer.text_model.final_layer_norm.bias" in towers
    assert names - towers == ({"transformer.text_projection.weight"} if pooled else set())
    assert not any("position_ids" in name for name in names)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("level", ["text_model.", ""], ids=["with_level", "without_level"])
def test_names_of_any_version_of_transformers_load_strictly(pooled: bool, level: str) -> None:
    encoder, other = clip_text(pooled=pooled), CLIPText(TINY, pooled=pooled)
    state = {name.replace("text_model.", level): tensor for name, tensor in encoder.state_dict().items()}
    state[f"transformer.{level}embeddings.position_ids"] = torch.arange(77)[None]
    other.load_state_dict(state)
    assert_close(other.state_dict(), encoder.state_dict(), rtol=0, atol=0)
    del state[f"transformer.{level}final_layer_norm.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*final_layer_norm\.bias"):
        other.load_state_dict(state)


def test_an_encoder_inside_a_module_is_renamed_alike() -> None:
    encoder = clip_text()
    outer = torch.nn.ModuleDict({"cond_stage_model": encoder})
    assert set(outer.state_dict()) == {f"cond_stage_model.{name}" for name in encoder.state_dict()}
    again = torch.nn.ModuleDict({"cond_stage_model": CLIPText(TINY)})
    again.load_state_dict(outer.state_dict())
    assert_close(again.state_dict(), outer.state_dict(), rtol=0, atol=0)


def test_an_encoder_built_on_meta_and_loaded_by_assignment_encodes() -> None:
    encoder = clip_text()
    with torch.device("meta"):
        empty = CLIPText(TINY)
    empty.load_state_dict(encoder.state_dict(), assign=True)
    assert_close(empty({"caption": CAPTIONS}).context, encoder({"caption": CAPTIONS}).context)


def test_its_arguments_rebuild_it() -> None:
    encoder = clip_text(layer=1, pooled=True, null="zeros")
    again = CLIPText(**encoder.arguments)
    again.load_state_dict(encoder.state_dict())
    assert_close(again({"caption": CAPTIONS}).parts(), encoder({"caption": CAPTIONS}).parts())


@pytest.mark.parametrize("pooled", [False, True])
def test_a_folder_of_transformers_loads(tmp_path: Path, pooled: bool) -> None:
    """Also where its config has the end token of old files, 2."""
    architecture = CLIPTextModelWithProjection if pooled else CLIPTextModel
    model = randomized(architecture(CLIPTextConfig(**TINY, **{**VOCABULARY, "eos_token_id": 2})))
    model.save_pretrained(tmp_path)
    encoder = CLIPText.load(tmp_path, layer=2, pooled=pooled, null="zeros")
    hidden = model(input_ids=transformers_ids(CAPTIONS), output_hidden_states=True).hidden_states[2]
    norm = (model.text_model if pooled else model).final_layer_norm
    assert relative_error(encoder({"caption": CAPTIONS}).context, norm(hidden)) < 1e-5
    assert encoder.arguments["null"] == "zeros" and not any(p.requires_grad for p in encoder.parameters())


def test_a_folder_with_the_names_of_older_versions_loads(tmp_path: Path) -> None:
    """Those of the text_encoder folders of SD 1: with `text_model.` and a buffer that has gone."""
    encoder = clip_text()
    CLIPTextModel(CLIPTextConfig(**TINY, **VOCABULARY)).save_pretrained(tmp_path)
    old = {name.removeprefix("transformer."): tensor for name, tensor in encoder.state_dict().items()}
    old["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_close(CLIPText.load(tmp_path).state_dict(), encoder.state_dict(), rtol=0, atol=0)


def test_a_folder_of_a_whole_clip_model_loads(tmp_path: Path) -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(text_config={**TINY, **VOCABULARY}, vision_config={**vision, "image_size": 32})
    model = randomized(CLIPModel(config))
    model.save_pretrained(tmp_path)
    expected = model.text_model(input_ids=transformers_ids(CAPTIONS)).last_hidden_state
    assert relative_error(CLIPText.load(tmp_path)({"caption": CAPTIONS}).context, expected) < 1e-5


def test_a_missing_encoder_is_one_line_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got .*nowhere, which cannot be read .*expected a folder.*clip-vit-large"):
        CLIPText.load(tmp_path / "nowhere")


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    CLIPTextModel(CLIPTextConfig(**TINY, **VOCABULARY)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"1 weights are missing, first text_projection\.weight"):
        CLIPText.load(tmp_path, pooled=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": 4}, "got conditioner.layer=4, expected 0 to 3"),
        ({"null": "none"}, "got conditioner.null=none, expected one of empty, zeros"),
        ({"max_chunks": 0}, "got conditioner.max_chunks=0, expected at least 1"),
        ({"padding": "left"}, "got tokenizer.padding=left, expected zero or end"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CLIPText(TINY, **settings)
