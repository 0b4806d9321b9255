"""`ldm evaluate`: measures a trained model, as its experiment says or with other sampling settings."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ldm.cli.build import build
from ldm.cli.chain import shown
from ldm.cli.console import heading, say
from ldm.cli.errors import UserError, user_mistakes
from ldm.cli.run_folder import run_folder_of
from ldm.cli.sampling import chosen_settings, find_checkpoint, open_pipeline
from ldm.cli.train import table
from ldm.cli.trust import check_targets


def evaluate(config: DictConfig, overrides: Sequence[str]) -> None:
    """Measures the model that `checkpoint` names, writes the figures beside it and prints them.

    Raises:
        UserError: no model, or nothing that says how to measure it.
    """
    checkpoint = find_checkpoint(config)
    folder = run_folder_of(checkpoint.absolute())
    evaluation = find_evaluation(config, folder)
    out = Path(config.out) if config.out else (folder or Path()) / "evaluations" / f"{datetime.now():%Y%m%d-%H%M%S}"
    say(f"model: {shown(checkpoint.absolute())}", style="dim")
    pipeline = open_pipeline(checkpoint, config.device, trust=list(config.trust))
    figures = build(evaluation)(pipeline, out, **chosen_settings(config, pipeline))
    heading(f"evaluated; figures in {shown(out.absolute())}")
    for line in table(figures):
        say(f"  {line}")


def find_evaluation(config: DictConfig, folder: Path | None) -> DictConfig:
    """The chosen evaluation, or the one in the run's own config.

    Raises:
        UserError: there is neither.
    """
    with user_mistakes():
        own = OmegaConf.select(OmegaConf.load(folder / "config.yaml"), "evaluation") if folder else None
    if own is not None:
        with user_mistakes():
            check_targets(OmegaConf.to_container(own), trust=list(config.trust))
    chosen = config.evaluation
    if chosen and "_target_" not in chosen and own:
        # ++evaluation.prompts.num_samples=100 changes one thing of the run's own.
        chosen = OmegaConf.merge(own, chosen)
    found = chosen or own
    if not found:
        raise UserError("evaluation: got none, and the model's own config has none; train with one")
    return DictConfig(found)
