"""`ldm shard`: writes a dataset as WebDataset shards into a run folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from ldm.cli.build import build
from ldm.cli.chain import run_chain, shown
from ldm.cli.console import say
from ldm.cli.run_folder import RunFolder


def shard(config: DictConfig, overrides: Sequence[str]) -> None:
    """Writes the dataset and says where it is."""
    folder = run_chain("shard", config, overrides)
    say(f"shards: {shown(folder.path)}")


def produce(folder: RunFolder) -> dict[str, Any]:
    """Calls the dataset's writer with the run folder; its answer is the summary."""
    return {"summary": build(folder.config.dataset, folder.path)}
