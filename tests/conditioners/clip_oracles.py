"""Tiny encoders with every weight random, and the same text through other libraries."""

from functools import cache
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer as TransformersTokenizer

from ldm.conditioners import CLIPText, OpenCLIPText

CAPTIONS = ["a red fox", "", "two dogs, on a beach, at 5 o'clock", "word " * 100]
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "projection_dim": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def randomized(module: nn.Module, seed: int = 0) -> Any:
    """Moves every weight, those of norms included, away from its initial value."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return module.eval()


def clip_text(**settings: Any) -> CLIPText:
    return randomized(CLIPText(TINY, **settings))


def open_clip_text(**settings: Any) -> OpenCLIPText:
    return randomized(OpenCLIPText(32, 3, 4, **settings))


@cache
def transformers_tokenizer(pad_token: str = "<|endoftext|>") -> TransformersTokenizer:
    """CLIP's tokenizer of transformers, from the vocabulary inside open_clip."""
    pairs = open_clip.SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): i for token, i in pairs.encoder.items()}
    return TransformersTokenizer(vocab=vocabulary, merges=list(pairs.bpe_ranks), pad_token=pad_token)


def transformers_ids(captions: list[str], pad_token: str = "<|endoftext|>") -> Tensor:
    """Padded with the end token, as the tokenizer of SD 1 is, or with "!", id 0, as those of SD 2 and SDXL are."""
    encode = transformers_tokenizer(pad_token)
    return encode(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt")["input_ids"]


def relative_error(ours: Tensor | None, theirs: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    assert ours is not None and ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def as_transformers(state: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """The weights of an open_clip text tower under the names of transformers, its first layers only."""
    converted = {
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "text_model.final_layer_norm.weight": state["ln_final.weight"],
        "text_model.final_layer_norm.bias": state["ln_final.bias"],
        "text_projection.weight": state["text_projection"].T.contiguous(),
    }
    parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
    parts |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for i in range(num_layers):
        ours, theirs = f"transformer.resblocks.{i}.", f"text_model.encoder.layers.{i}."
        for kind in ("weight", "bias"):
            for our_part, their_part in parts.items():
                converted[f"{theirs}{their_part}.{kind}"] = state[f"{ours}{our_part}.{kind}"]
            for name, tensor in zip("qkv", state[f"{ours}attn.in_proj_{kind}"].chunk(3), strict=True):
                converted[f"{theirs}self_attn.{name}_proj.{kind}"] = tensor
    return converted
