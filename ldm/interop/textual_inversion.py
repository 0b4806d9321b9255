"""Files of textual inversion (Gal et al. 2022): the embeddings of a new word, read, used and written."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ldm.conditioners import Conditioner
from ldm.interop.lora_layers import text_encoders
from ldm.interop.safe_load import read_file
from ldm.interop.safe_save import write_file

Format = Literal["diffusers", "a1111"]
# SDXL's two encoders, in their order, in the files of every tool.
SDXL = ("clip_l", "clip_g")
A1111 = "emb_params"


def apply_embedding(conditioner: Conditioner, path: Path | str, *, token: str | None = None) -> str:
    """Teaches a model's text encoders the word of a file; returns the word, for prompts.

    Args:
        path: diffusers' format ({word: vectors}) or the web interfaces' (emb_params; string_to_param in a .pt), or
            SDXL's clip_l and clip_g.
        token: the word; None takes the file's own, or its name where it says none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no embedding, or one for other text encoders.
    """
    stated, vectors = read_embedding(path)
    encoders = [encoder for _, encoder in text_encoders(conditioner)]
    widths = [encoder.token_embedding.weight.shape[1] for encoder in encoders]
    found = [vector.shape[1] for vector in vectors]
    if widths != found:
        raise ValueError(
            f"got {path} with vectors of width {found}, expected {widths}, those of this model's text encoders; use an "
            "embedding that was learned with this family of models"
        )
    word = token or stated or Path(path).stem
    for encoder, vector in zip(encoders, vectors, strict=True):
        encoder.add_tokens([word], vector[None])
    return word


def read_embedding(path: Path | str) -> tuple[str | None, list[Tensor]]:
    """(the word that the file states, for each text encoder the vectors (n, D)).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no embedding.
    """
    state = _read(Path(path))
    stated: str | None = None
    if set(state) == set(SDXL):
        vectors = [state[name] for name in SDXL]
    elif len(state) == 1:
        (name,) = state
        stated = None if name in (A1111, "*") else name
        vectors = list(state.values())
    else:
        vectors = []
    vectors = [torch.atleast_2d(vector) for vector in vectors]
    if not vectors or any(vector.ndim != 2 for vector in vectors):
        raise ValueError(
            f"got {path} with {len(state)} tensors, such as {next(iter(state), 'none')}, expected the embedding of one "
            f"word: {{word: vectors}}, {A1111}, or {' and '.join(SDXL)}"
        )
    return stated, vectors


def write_embedding(path: Path | str, *, token: str, vectors: Sequence[Tensor], format: Format = "diffusers") -> None:
    """Writes a word's vectors, (n, D) for each text encoder, as a safetensors file.

    Args:
        format: diffusers' names the word in the file; in a1111's the file's name is the word. Of two encoders,
            SDXL's, both are the same.

    Raises:
        ValueError: an unknown format, or more than two encoders.
    """
    if format not in get_args(Format):
        raise ValueError(f"got format={format}, expected one of {', '.join(get_args(Format))}")
    if not 1 <= len(vectors) <= len(SDXL):
        raise ValueError(f"got vectors of {len(vectors)} text encoders, expected one, or SDXL's two")
    names = SDXL if len(vectors) > 1 else [token if format == "diffusers" else A1111]
    write_file(Path(path), dict(zip(names, vectors, strict=True)))


def _read(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a file; those of a .pt lie in a dict inside."""
    if path.suffix.lower() not in (".pt", ".bin") or not path.is_file():
        return read_file(path).state
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"got {path}, which is damaged or not only tensors ({reason}); use .safetensors") from error
    inner = content.get("string_to_param", content) if isinstance(content, dict) else {}
    return {str(name): value.detach() for name, value in inner.items() if isinstance(value, Tensor)}
