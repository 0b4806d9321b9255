"""Names of text encoders' tensors: those of open_clip, of transformers, and of CompVis files, into one another.

"open_clip" names are those of its text tower, which CompVis files hold under `cond_stage_model.model.`; "transformers"
names are those of its CLIPTextModel without the leading `text_model.`, which files have and newer modules lack.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# The width of one head in every published CLIP text encoder.
HEAD_WIDTH = 64
# What files hold besides the encoder, and nothing reads: buffers, the contrastive temperature, the picture's tower.
NOT_READ = re.compile(r"(.*\.)?position_ids|logit_scale|visual\..*|attn_mask")

_OUTER = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_INNER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_QKV = ("q_proj", "k_proj", "v_proj")


def open_clip_to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's text tower under the names of transformers; the fused query, key and value are split (views).

    Raises:
        ValueError: a tensor that such a tower does not have.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        block = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)", name)
        fused = re.fullmatch(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", name)
        if name in _OUTER:
            renamed[_OUTER[name]] = tensor
        elif name == "text_projection":
            renamed["text_projection.weight"] = tensor.T
        elif fused:
            for part, values in zip(_QKV, tensor.chunk(3), strict=True):
                renamed[f"encoder.layers.{fused[1]}.self_attn.{part}.{fused[2]}"] = values
        elif block and block[2] in _INNER:
            renamed[f"encoder.layers.{block[1]}.{_INNER[block[2]]}.{block[3]}"] = tensor
        else:
            raise ValueError(f"got a tensor {name}, which no open_clip text encoder has; expected one of open_clip's")
    return renamed


def transformers_to_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `open_clip_to_transformers`.

    Raises:
        ValueError: a tensor that a CLIP text encoder of transformers does not have, or a layer without all of q, k, v.
    """
    outer = {theirs: ours for ours, theirs in _OUTER.items()}
    inner = {theirs: ours for ours, theirs in _INNER.items()}
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        block = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if name in outer:
            renamed[outer[name]] = tensor
        elif name == "text_projection.weight":
            renamed["text_projection"] = tensor.T
        elif block and block[2] in inner:
            renamed[f"transformer.resblocks.{block[1]}.{inner[block[2]]}.{block[3]}"] = tensor
        elif block and block[2] == "self_attn.q_proj":
            place = f"encoder.layers.{block[1]}.self_attn"
            parts = [_get(state, f"{place}.{part}.{block[3]}") for part in _QKV]
            renamed[f"transformer.resblocks.{block[1]}.attn.in_proj_{block[3]}"] = torch.cat(parts)
        elif not (block and block[2] in ("self_attn.k_proj", "self_attn.v_proj")):
            raise ValueError(f"got a tensor {name}, which no CLIP text encoder of transformers has")
    return renamed


def without_prefix(state: Mapping[str, Tensor], *, prefix: str = "text_model.") -> dict[str, Tensor]:
    """Names of transformers without the leading `text_model.`, and without what nothing reads."""
    named = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in named.items() if not NOT_READ.fullmatch(name)}


def with_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as files have them, which every version of transformers reads: `text_model.` but for the projection."""
    bare = without_prefix(state)
    return {
        name if name.startswith("text_projection") else f"text_model.{name}": tensor for name, tensor in bare.items()
    }


def clip_config(state: Mapping[str, Tensor], *, hidden_act: str = "quick_gelu") -> dict[str, Any]:
    """Arguments of `transformers.CLIPTextConfig` that the shapes tell, from names without `text_model.`.

    The heads are 64 wide, as in every published encoder, and one where the encoder is narrower.

    Raises:
        ValueError: these are not the weights of such an encoder.
    """
    vocabulary, width = _get(state, "embeddings.token_embedding.weight").shape
    config = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": _get(state, "encoder.layers.0.mlp.fc1.weight").shape[0],
        "num_hidden_layers": num_layers(state, "encoder.layers."),
        "num_attention_heads": max(width // HEAD_WIDTH, 1),
        "max_position_embeddings": _get(state, "embeddings.position_embedding.weight").shape[0],
        "hidden_act": hidden_act,
    }
    if "text_projection.weight" in state:
        config["projection_dim"] = state["text_projection.weight"].shape[0]
    return config


def num_layers(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered parts there are under a prefix such as `encoder.layers.`."""
    return len({name[len(prefix) :].partition(".")[0] for name in state if name.startswith(prefix)})


def clip_vocabulary() -> tuple[dict[str, int], list[str]]:
    """(vocabulary, merges) of CLIP's tokenizer, from open_clip's copy: what vocab.json and merges.txt hold."""
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): index for token, index in tokenizer.encoder.items()}
    return vocabulary, [" ".join(pair) for pair in tokenizer.bpe_ranks]


def ldm_bert_to_compvis(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The text transformer of LDM's 1.45 B model under CompVis names, from those of a diffusers folder.

    Raises:
        ValueError: a tensor that it does not have.
    """
    renamed = {}
    for name, tensor in state.items():
        block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if name in _BERT_OUTER:
            renamed[_BERT_OUTER[name]] = tensor
        elif block and block[2] in _BERT_INNER:
            layer, place = _BERT_INNER[block[2]]
            renamed[f"transformer.attn_layers.layers.{2 * int(block[1]) + layer}.{place}"] = tensor
        elif not NOT_READ.fullmatch(name):
            raise ValueError(f"got a tensor {name}, which the text transformer of LDM does not have")
    return renamed


def ldm_bert_from_compvis(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `ldm_bert_to_compvis`."""
    outer = {ours: theirs for theirs, ours in _BERT_OUTER.items()}
    inner = {place: theirs for theirs, place in _BERT_INNER.items()}
    renamed = {}
    for name, tensor in state.items():
        block = re.fullmatch(r"transformer\.attn_layers\.layers\.(\d+)\.(.+)", name)
        if name in outer:
            renamed[outer[name]] = tensor
        elif block and (int(block[1]) % 2, block[2]) in inner:
            theirs = inner[(int(block[1]) % 2, block[2])]
            renamed[f"model.layers.{int(block[1]) // 2}.{theirs}"] = tensor
        else:
            raise ValueError(f"got a tensor {name}, which the text transformer of LDM does not have")
    return renamed


_BERT_OUTER = {
    "model.embed_tokens.weight": "transformer.token_emb.weight",
    "model.embed_positions.weight": "transformer.pos_emb.emb.weight",
    "model.layer_norm.weight": "transformer.norm.weight",
    "model.layer_norm.bias": "transformer.norm.bias",
    "to_logits.weight": "transformer.to_logits.weight",
    "to_logits.bias": "transformer.to_logits.bias",
}
# (which of a layer's two sublayers, the name within it), by the name within a layer of diffusers.
_BERT_INNER = {
    "self_attn_layer_norm.weight": (0, "0.weight"),
    "self_attn_layer_norm.bias": (0, "0.bias"),
    "self_attn.q_proj.weight": (0, "1.to_q.weight"),
    "self_attn.k_proj.weight": (0, "1.to_k.weight"),
    "self_attn.v_proj.weight": (0, "1.to_v.weight"),
    "self_attn.out_proj.weight": (0, "1.to_out.weight"),
    "self_attn.out_proj.bias": (0, "1.to_out.bias"),
    "final_layer_norm.weight": (1, "0.weight"),
    "final_layer_norm.bias": (1, "0.bias"),
    "fc1.weight": (1, "1.net.0.0.weight"),
    "fc1.bias": (1, "1.net.0.0.bias"),
    "fc2.weight": (1, "1.net.2.weight"),
    "fc2.bias": (1, "1.net.2.bias"),
}


def _get(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise ValueError(f"got {len(state)} tensors without {name}, expected those of a CLIP text encoder")
    return state[name]
