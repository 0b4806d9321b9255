"""Attention over pixels: one qkv convolution here, three linear layers in diffusers, other names before them."""

from __future__ import annotations

import re

import torch
from einops import rearrange
from torch import Tensor

FORMER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def present_name(name: str) -> str:
    """A tensor's name in diffusers today, given that name or the one of its older versions."""
    match = re.fullmatch(r"(.*\battentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)", name)
    return name if match is None else f"{match[1]}.{FORMER[match[2]]}.{match[3]}"


def split_qkv(qkv: Tensor, *, num_heads: int, new_order: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (3C, C, 1) or biases (3C,) of the qkv convolution as those of three linear layers, (C, C) or (C,).

    The rows are laid out (head, q/k/v, channel), or with new_order (q/k/v, head, channel).
    """
    flat = qkv.flatten(1) if qkv.ndim > 1 else qkv
    pattern = "(three h d) ... -> three (h d) ..." if new_order else "(h three d) ... -> three (h d) ..."
    q, k, v = rearrange(flat, pattern, three=3, h=num_heads)
    return q, k, v


def join_qkv(q: Tensor, k: Tensor, v: Tensor, *, num_heads: int) -> Tensor:
    """Undoes `split_qkv` in the order (head, q/k/v, channel): weights (3C, C, 1) or biases (3C,)."""
    joined = rearrange(torch.stack([q, k, v]), "three (h d) ... -> (h three d) ...", h=num_heads)
    return joined if q.ndim == 1 else joined.flatten(1).unsqueeze(-1)
