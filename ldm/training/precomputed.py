"""What training on text embeddings needs besides: a check of who made them, and their null condition kept."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ldm.conditioners import Conditioner
from ldm.conditioners.precomputed import precomputed_parts, tokens_sha256
from ldm.data import ShardDataset

TARGET = "ldm.conditioners.PrecomputedText"


def check_text(conditioner: Conditioner, dataset: ShardDataset) -> None:
    """Refuses shards whose text embeddings are missing, or of another encoder or tokenizer than the conditioner's.

    Raises:
        ValueError: either is so.
    """
    if (dataset.text_sha256 or "").startswith("tokens-") and dataset.text_sha256 != tokens_sha256(conditioner):
        raise ValueError(
            "conditioner: got another tokenizer than that which made the shards' token ids, expected the same; write "
            "them with ldm data encode conditioner=... text=ids, or without text"
        )
    for part in precomputed_parts(conditioner):
        found = dataset.text_sha256
        if found is None:
            raise ValueError(
                "conditioner: got precomputed_text with shards without text embeddings, expected some; write them with "
                "ldm data encode conditioner=..., or train with the text encoder itself"
            )
        if found != part.text_sha256:
            raise ValueError(
                f"conditioner.path: got the null condition of the text encoder {part.text_sha256[:12]}, expected that "
                f"of {found[:12]}, which made the shards' text embeddings; give the text.safetensors beside the shards"
            )


def text_files(config: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """The nodes of a model's config that read a null condition, and the name that a run folder's copy of it has."""
    for number, node in enumerate(_nodes(config)):
        yield node, "text.safetensors" if number == 0 else f"text-{number + 1}.safetensors"


def keep_text_files(config: Any, folder: Path) -> None:
    """Copies them into a run folder, where the model is loaded from when the shards are gone."""
    for node, name in text_files(config):
        shutil.copyfile(node["path"], folder / name)


def use_text_files(config: dict[str, Any], folder: Path | None) -> None:
    """Lets a stored config, in place, mean the copies in its run folder, where there are some."""
    for node, name in text_files(config):
        if folder is not None and (folder / name).is_file():
            node["path"] = str(folder / name)


def _nodes(config: Any) -> Iterator[dict[str, Any]]:
    if isinstance(config, dict):
        if config.get("_target_") == TARGET:
            yield config
        for value in config.values():
            yield from _nodes(value)
    elif isinstance(config, list):
        for value in config:
            yield from _nodes(value)
