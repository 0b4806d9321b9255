"""The syntax of prompts at sampling time: weights in brackets, and prompts longer than the encoder's window.

As in the widely used web interfaces: `(word:1.3)` weighs 1.3, `(word)` 1.1 and `[word]` 1 / 1.1; brackets nest and
multiply, a backslash makes a bracket a letter, and `BREAK` ends a chunk.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

EMPHASIS = 1.1
_TOKEN = re.compile(r"\\[()\[\]\\]|[(\[\])]|:\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\)|\\|:|[^\\()\[\]:]+")
_BREAK = re.compile(r"\s*\bBREAK\b\s*")


class Weighted(NamedTuple):
    """A stretch of a prompt and the weight of its words."""

    text: str
    weight: float


class Chunk(NamedTuple):
    """What the encoder reads at once: token ids without start and end, and a weight each."""

    ids: list[int]
    weights: list[float]


def parse_prompt(prompt: str) -> list[Weighted]:
    """Splits a prompt into stretches of one weight; any text is a prompt.

    A bracket that is never closed reaches to the end; one that was never opened is a letter. Weights of stretches that
    follow each other differ, so that a prompt without brackets is one stretch.
    """
    pieces: list[Weighted] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        start = opened[bracket].pop()
        pieces[start:] = [Weighted(text, weight * factor) for text, weight in pieces[start:]]

    for token in _TOKEN.findall(prompt):
        if token in opened:
            opened[token].append(len(pieces))
        elif token == "]" and opened["["]:
            close("[", 1 / EMPHASIS)
        elif token == ")" and opened["("]:
            close("(", EMPHASIS)
        elif token.startswith(":") and token.endswith(")") and opened["("]:
            close("(", float(token[1:-1]))
        else:
            pieces.append(Weighted(token[1:] if len(token) == 2 and token[0] == "\\" else token, 1.0))
    while opened["("]:
        close("(", EMPHASIS)
    while opened["["]:
        close("[", 1 / EMPHASIS)
    return _merged(pieces)


def _merged(pieces: Sequence[Weighted]) -> list[Weighted]:
    merged = [Weighted("", 1.0)] if not pieces else [pieces[0]]
    for text, weight in pieces[1:]:
        if weight == merged[-1].weight:
            merged[-1] = Weighted(merged[-1].text + text, weight)
        else:
            merged.append(Weighted(text, weight))
    return merged


def chunk_prompt(prompt: str, encode: Callable[[str], Sequence[int]], *, size: int) -> list[Chunk]:
    """Parses a prompt into chunks of at most `size` tokens, at least one chunk.

    Args:
        encode: from text to token ids, without start and end.
    """
    chunks = [Chunk([], [])]
    for text, weight in parse_prompt(prompt):
        for i, part in enumerate(_BREAK.split(text)):
            if i and chunks[-1].ids:
                chunks.append(Chunk([], []))
            for token in encode(part):
                if len(chunks[-1].ids) == size:
                    chunks.append(Chunk([], []))
                chunks[-1].ids.append(token)
                chunks[-1].weights.append(weight)
    return chunks if len(chunks) == 1 or chunks[-1].ids else chunks[:-1]


def weigh(context: Tensor, weights: Tensor) -> Tensor:
    """Multiplies embeddings (N, L, D) by weights (N, L) and restores the mean of each of the N chunks.

    Chunks whose weights are all 1 stay as they are. Where the mean is zero to rounding (below 1e-4 of the root mean
    square), or multiplying turned its sign, there is nothing to restore, and the product stands.
    """
    weighted = context * weights[..., None].to(context)
    before, after = context.float().mean((1, 2)), weighted.float().mean((1, 2))
    floor = 1e-4 * context.float().square().mean((1, 2)).sqrt()
    restores = (torch.minimum(before.abs(), after.abs()) > floor) & (before * after > 0)
    scale = torch.where(restores, before / after, torch.ones_like(before))
    plain = (weights == 1).all(1)[:, None, None]
    return torch.where(plain, context, weighted * scale[:, None, None].to(context))
