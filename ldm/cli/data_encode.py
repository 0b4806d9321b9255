"""`ldm data encode`: pictures to latents and captions to text embeddings, so that training need encode neither."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from ldm.cli.build import build
from ldm.cli.chain import run_chain, shown
from ldm.cli.console import rank, say
from ldm.cli.data import FAULTS_FOUND, Progress
from ldm.cli.errors import RunFailed, UserError, user_mistakes
from ldm.cli.run_folder import RunFolder
from ldm.cli.sampling import usable_device

if TYPE_CHECKING:
    from ldm.generation.encode import Encoders, EncodeWork

COMMAND = "data encode"
SETTINGS = ("batch_size", "text", "dtype", "text_dtype", "threads", "readers")
# What training does to pictures, and encoding does not: a picture is encoded as its centre, once.
OF_TRAINING = ("flip", "augmentation", "buckets", "derive")


def encode(config: DictConfig, overrides: Sequence[str]) -> None:
    """Encodes and says where the shards are."""
    folder = run_chain(COMMAND, config, overrides)
    say(f"encoded shards: {shown(folder.path)}")


def produce(folder: RunFolder) -> dict[str, Any]:
    """Encodes every split of the data into the run folder, wherever the executor says.

    Raises:
        UserError: autoencoder or data is missing or wrong.
        RunFailed: too many samples cannot be read.
    """
    config = folder.config
    for part in ("autoencoder", "data"):
        if config.get(part) is None:
            raise UserError(f"{part}: {config.name} sets none, so there is nothing to encode; choose {part}=...")
    _refuse_training(config.data)
    from ldm.generation.encode import Settings, finish, prepare

    with user_mistakes():
        settings = Settings(**{name: config[name] for name in SETTINGS})
        data, executor = build(config.data), build(config.executor)
        load = LoadEncoders(_needed(config, resolution=data.resolution), usable_device(config.device))
        work = prepare(load, data, folder.path, settings=settings, keep=executor.is_here)
        executor.run(work, progress=Progress())
    if rank():
        return {}
    summary = finish(work)
    _check_share(summary, work, share=data.ledger.max_bad_fraction)
    return {"summary": summary}


@dataclass(frozen=True)
class LoadEncoders:
    """Loads the encoders of a run in whatever process encodes; can be pickled.

    Args:
        config: the plain nodes autoencoder, conditioner, targets, and the run's own resolution, flips and seed.
        device: cpu or cuda, of which each process takes its own.
    """

    config: dict[str, Any]
    device: str

    def __call__(self) -> Encoders:
        """Builds each autoencoder once, however many targets use it."""
        import torch

        from ldm.generation.encode import Encoders, Target

        # An encoder without weights of its own draws them: the same in every process, and when a run goes on.
        torch.manual_seed(self.config["seed"])

        built: dict[str, Any] = {}
        place = device_of_worker(self.device)
        nodes = {"": {}, **self.config["targets"]}
        targets = {}
        for name, node in nodes.items():
            chosen = {**self.config, **{key: value for key, value in (node or {}).items() if value is not None}}
            key = json.dumps(chosen["autoencoder"], sort_keys=True)
            if key not in built:
                built[key] = build(OmegaConf.create(chosen["autoencoder"])).to(place).eval()
            targets[name] = Target(built[key], chosen["resolution"], chosen["flips"])
        text = self.config["conditioner"]
        return Encoders(targets, build(OmegaConf.create(text)).to(place).eval() if text else None)


def device_of_worker(device: str) -> str:
    """The device of this process: of several GPUs, the one with this worker's number."""
    if device != "cuda":
        return device
    import torch

    from ldm.generation.executors import worker_number

    return f"cuda:{worker_number() % max(torch.cuda.device_count(), 1)}"


def _refuse_training(data: DictConfig) -> None:
    """Refuses what would change nothing of the latents; raises UserError."""
    for name in OF_TRAINING:
        if data.get(name):
            remedy = "set flips=true to store mirrored ones, too" if name == "flip" else "train on the pictures for it"
            raise UserError(
                f"data.{name}: got a setting of training, which encoding does not follow, for it encodes the centre of "
                f"each picture; leave it out, and {remedy}"
            )


def _needed(config: DictConfig, *, resolution: int | None) -> dict[str, Any]:
    """The plain config of the encoders.

    Raises:
        UserError: a target has a setting that there is none of, or no resolution is given.
    """
    names = ("autoencoder", "conditioner", "targets", "flips", "seed")
    plain: dict[str, Any] = {name: OmegaConf.to_container(config, resolve=True).get(name) for name in names}  # type: ignore[union-attr]
    plain["targets"] = plain["targets"] or {}
    known = ("autoencoder", "resolution", "flips")
    for name, node in plain["targets"].items():
        if unknown := sorted(set(node or {}) - set(known)):
            raise UserError(f"targets.{name}: got {', '.join(unknown)}, expected some of {', '.join(known)}")
    if resolution is None:
        raise UserError("data.resolution: got null, expected the pixels to encode at, as in data.resolution=256")
    return {**plain, "resolution": resolution}


def _check_share(summary: dict[str, Any], work: EncodeWork, *, share: float) -> None:
    """Says how many samples could not be read; raises RunFailed for more than a share of all."""
    from ldm.generation.encode import LEFT_OUT

    bad, total = summary["bad"], sum(summary.get(split, 0) for split in {source.split for source in work.sources})
    if not bad:
        return
    told = f"{bad:,} of {bad + total:,} samples cannot be read; {shown(work.folder / LEFT_OUT)} names them"
    if bad > share * (bad + total):
        raise RunFailed(f"{told}; mend them, or raise data.max_bad_fraction, which is {share}", FAULTS_FOUND)
    say(told)
