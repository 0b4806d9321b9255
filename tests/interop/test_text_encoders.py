"""The names of text encoders' tensors go from one project to another and back, and compute the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pretrained import BERT
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from ldm.conditioners import CLIPTokenizer as OwnTokenizer
from ldm.conditioners import OpenCLIPText
from ldm.interop.text_encoders import (
    clip_config,
    clip_vocabulary,
    ldm_bert_from_compvis,
    ldm_bert_to_compvis,
    open_clip_to_transformers,
    transformers_to_open_clip,
    with_prefix,
    without_prefix,
)


def tower() -> OpenCLIPText:
    torch.manual_seed(0)
    encoder = OpenCLIPText(32, 3, 2, pooled=True, final_norm=False, projection_dim=24)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return encoder


def open_clip_state(encoder: OpenCLIPText) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("model."): tensor
        for name, tensor in encoder.state_dict().items()
        if not name.endswith("logit_scale")
    }


def test_open_clip_to_transformers_and_back_is_exact() -> None:
    state = open_clip_state(tower())
    back = transformers_to_open_clip(open_clip_to_transformers(state))
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor), name


@torch.no_grad()
def test_transformers_computes_the_same_with_open_clips_weights() -> None:
    encoder = tower()
    theirs = open_clip_to_transformers(open_clip_state(encoder))
    ends = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 0}
    config = CLIPTextConfig(**{**clip_config(theirs, hidden_act="gelu"), "num_attention_heads": 2, **ends})
    model: Any = CLIPTextModelWithProjection(config).eval()
    missing, unexpected = model.load_state_dict(with_prefix(theirs), strict=False)
    assert (missing, unexpected) == ([], [])
    ids = encoder.tokenizer(["two words", ""])[0]
    found, expected = encoder.encode_ids(ids), model(ids, output_hidden_states=True)
    torch.testing.assert_close(found.context, expected.hidden_states[-2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.vector, expected.text_embeds, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("convert", [open_clip_to_transformers, transformers_to_open_clip])
def test_a_tensor_of_another_model_is_named(convert: Any) -> None:
    with pytest.raises(ValueError, match="visual_projection"):
        convert({"visual_projection": torch.zeros(1)})


def test_buffers_that_nothing_reads_are_left_out() -> None:
    state = {"text_model.embeddings.position_ids": torch.arange(3), "text_model.final_layer_norm.bias": torch.ones(2)}
    assert list(without_prefix(state)) == ["final_layer_norm.bias"]
    assert list(with_prefix(state)) == ["text_model.final_layer_norm.bias"]


def test_the_vocabulary_tokenizes_in_transformers_as_open_clip_does(tmp_path: Path) -> None:
    tokens, merges = clip_vocabulary()
    (tmp_path / "vocab.json").write_text(json.dumps(tokens))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    theirs, ours = CLIPTokenizer.from_pretrained(tmp_path, model_max_length=77), OwnTokenizer(padding="end")
    texts = ["A photo of a café, 3.5mm!", "", "can't  stop 日本 <b>", "word " * 90]
    found = theirs(texts, padding="max_length", max_length=77, truncation=True).input_ids
    assert found == ours(texts)[0].tolist()


def test_the_text_transformer_of_ldm_goes_to_diffusers_and_back() -> None:
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    state = {name: torch.randn(shape) for name, shape in BERT.items()}
    theirs = ldm_bert_from_compvis(state)
    config = LDMBertConfig(vocab_size=50, encoder_layers=2, encoder_ffn_dim=256, encoder_attention_heads=8, d_model=64)
    assert {name: tensor.shape for name, tensor in theirs.items()} == {
        name: tensor.shape for name, tensor in LDMBertModel(config).state_dict().items()
    }
    back = ldm_bert_to_compvis(theirs)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
