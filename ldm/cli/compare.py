"""`ldm compare`: evaluations side by side on one page, with curves, and beside what a paper published."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from ldm.cli.evaluation_report import open_folders, tell, write_report


def compare(config: DictConfig, overrides: Sequence[str]) -> None:
    """Writes the page of the evaluations and prints their figures.

    Raises:
        UserError: there is no such evaluation or card, or a setting is wrong.
    """
    evaluations = open_folders(config.evaluations)
    names = "\n".join(str(one.path.absolute()) for one in evaluations)
    digest = hashlib.sha256(names.encode()).hexdigest()[:8]
    out = Path(str(config.out)).expanduser() if config.out else Path("comparisons") / digest
    comparisons = write_report(evaluations, out, amounts=config.report, card=config.card)
    tell(evaluations, comparisons)
