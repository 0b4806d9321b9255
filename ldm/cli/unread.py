"""Refuses parts that a command line chooses and nothing in the experiment reads."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from ldm.cli.errors import UserError

# Groups whose choice is a part for others to be built of; the rest (model, data, trainer, callback, ...) are built as
# they are.
PARTS = (
    *("network", "autoencoder", "conditioner", "discriminator", "perceptual", "schedule", "parameterization"),
    *("weighting", "times", "sampler", "discretization", "guidance", "compile", "optimizer", "discriminator_optimizer"),
    *("lr_schedule", "augmentation", "derive", "buckets"),
)


def refuse_unread(config: DictConfig, overrides: Sequence[str]) -> None:
    """Refuses a part that would change the run's id and nothing else, such as a schedule beside a pretrained model.

    Args:
        config: composed and not resolved yet.
        overrides: of the command line.

    Raises:
        UserError: there is one.
    """
    text = json.dumps(OmegaConf.to_container(config, resolve=False), default=str)
    for item in overrides:
        part = item.lstrip("+").partition("=")[0]
        # ${part}, ${part.setting} or ${oc.select:part,null}
        if part in PARTS and not re.search(rf"\$\{{(?:oc\.select:)?\.*{part}\b", text):
            raise UserError(
                f"{item}: nothing in {config.name} reads {part}, so that it would change nothing; leave it out"
            )
