"""What to set where training ran out of memory, and setting it: smaller pieces of the same steps."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf, open_dict

from ldm.cli.errors import UserError

# What `on_out_of_memory` may be.
CHOICES = ("stop", "halve")
# Of the trainer, what is a number of batches where it is a whole one.
COUNTED = ("val_check_interval", "limit_val_batches", "limit_train_batches", "overfit_batches")
# The exit code: an error like any other.
OUT_OF_MEMORY = 1


def remedies(config: DictConfig) -> str:
    """What to type to train the same steps in less memory, in one line."""
    halved = smaller(config)
    same = f"; the same steps in pieces of half the size: {' '.join(halved)} run_id={config.run_id}" if halved else ""
    choice = ", or on_out_of_memory=halve for that to be done by itself" if halved and _one_process(config) else ""
    return f"{same}{choice}{''.join(f'; {line}' for line in _others(config))}"


def smaller(config: DictConfig) -> list[str]:
    """Overrides that halve what is computed at once, and change no step; none where that cannot be halved."""
    size = OmegaConf.select(config, "data.batch_size")
    halves = isinstance(size, int) and size > 1 and size % 2 == 0 and takes_pieces(config)
    return in_pieces(config, 2) if halves else []


def in_pieces(config: DictConfig, count: int) -> list[str]:
    """Overrides by which every batch goes through in so many pieces: the same steps, validated as often, on as much."""
    accumulated = OmegaConf.select(config, "trainer.accumulate_grad_batches") or 1
    size = OmegaConf.select(config, "data.batch_size")
    overrides = [f"data.batch_size={size // count}", f"trainer.accumulate_grad_batches={count * accumulated}"]
    # Lightning counts batches.
    for name in COUNTED:
        value = OmegaConf.select(config, f"trainer.{name}")
        if isinstance(value, int) and not isinstance(value, bool) and value:
            overrides.append(f"trainer.{name}={count * value}")
    return overrides


def halve(config: DictConfig) -> str | None:
    """Halves the pieces of a run in its config where it asks for that; what was set, or None where nothing was.

    Raises:
        UserError: `on_out_of_memory` is none of its choices.
    """
    if check_memory(config) != "halve" or not (overrides := smaller(config)):
        return None
    with open_dict(config):
        for override in overrides:
            key, _, value = override.partition("=")
            OmegaConf.update(config, key, int(value))
    return " ".join(overrides)


def check_memory(config: DictConfig) -> str:
    """The choice that a run makes.

    Raises:
        UserError: there is no such choice, or not for this model, or for a run of several processes.
    """
    chosen = str(config.get("on_out_of_memory", "stop"))
    if chosen not in CHOICES:
        raise UserError(f"on_out_of_memory: got {chosen}, expected {' or '.join(CHOICES)}")
    if chosen == "halve" and not takes_pieces(config):
        raise UserError(
            "on_out_of_memory: got halve for an autoencoder, whose steps are of whole batches, expected stop; set a "
            "smaller data.batch_size"
        )
    if chosen == "halve" and not _one_process(config):
        raise UserError(
            "on_out_of_memory: got halve for several processes, expected stop: where memory runs out on one of them, "
            "the others cannot begin anew with it; the line it ends with says what to set"
        )
    return chosen


def takes_pieces(config: DictConfig) -> bool:
    """Whether a step may be made of several batches: an autoencoder's two optimizers step on every batch."""
    from ldm.training import AutoencoderModule

    target = OmegaConf.select(config, "model._target_")
    made_by = None if target is None else get_object(target)
    # Of what a function makes nothing is known before it is made.
    return not isinstance(made_by, type) or not issubclass(made_by, AutoencoderModule)


def _one_process(config: DictConfig) -> bool:
    """Whether the run is of one process; of several, the others know nothing of one's memory."""
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    return alone and str(config.trainer.get("devices", 1)) == "1" and config.trainer.get("num_nodes", 1) == 1


def _others(config: DictConfig) -> Iterator[str]:
    if _can_recompute(config):
        yield "+network.checkpoint_blocks=true computes activations twice instead of keeping them"
    if str(OmegaConf.select(config, "trainer.precision")) == "32":
        yield "trainer.precision=bf16-mixed halves them"


def _can_recompute(config: DictConfig) -> bool:
    """Whether the network knows how to, and does not yet."""
    target = OmegaConf.select(config, "network._target_")
    known = target is not None and "checkpoint_blocks" in inspect.signature(get_object(target)).parameters
    return known and not OmegaConf.select(config, "network.checkpoint_blocks")
