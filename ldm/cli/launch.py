"""`ldm launch`: writes the file that starts a training on a cluster, once its config has been checked."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from ldm.cli.chain import plan, register_resolver, remember, shown
from ldm.cli.compose import compose_command, hydra_options
from ldm.cli.console import say
from ldm.cli.errors import UserError, user_mistakes
from ldm.cli.launch_template import literal, render
from ldm.cli.memory import in_pieces, takes_pieces
from ldm.cli.run_folder import RunFolder
from ldm.cli.unread import refuse_unread

# Settings that no template need ask for.
USED_HERE = ("launch", "template", "nodes", "gpus_per_node", "max_batch_per_gpu", "out")
# What follows from nodes and gpus_per_node, and so is none of the command line's.
FOLLOWING = ("trainer.devices", "trainer.num_nodes")


def launch(config: DictConfig, overrides: Sequence[str]) -> None:
    """Prints the file, or writes it to `out`, and says how to submit it.

    Raises:
        UserError: a setting of the launch or of the training is wrong; nothing is written then.
    """
    check_settings(config)
    own = own_keys()
    job = OmegaConf.create({key: value for key, value in _unresolved(config).items() if key in own})
    asked = [item for item in overrides if _first_key(item) not in {*own, "launch"}]
    refuse_without_effect(job, [_first_key(item) for item in overrides if item not in asked])
    given = render_overrides(job)
    trained = check_training([*asked, *given, *placed(config, asked)])
    follows = [*given, *placed(config, asked), *shares(config, trained), *strategy(config, trained)]
    folder, missing = check_run([*asked, *follows])
    fill(job, folder, words=["train", *hydra_options(), *asked, *follows])
    text = render(job)
    deliver(text, job)
    for title in missing:
        note(f"not finished yet: ldm {title}; run it before, or the first process does while the others wait")
    note(f"run folder: {shown(folder.path)}; the same file goes on in it")
    if (key := job.template.get("kept_by")) and job[key] is None:
        note(f"{key}: got none, so that the run goes with its machines; set {key}=... for it to outlive them")
    if not job.out:
        note(f"write it:   add out={job.template.file}")
    note(f"submit it:  {job.template.submit}")


def check_settings(config: DictConfig) -> None:
    """Refuses numbers of nodes and GPUs that no launcher, or not this one, can start.

    Raises:
        UserError: got, expected, remedy.
    """
    for key in ("nodes", "gpus_per_node", "max_batch_per_gpu"):
        if config[key] is not None and (not isinstance(config[key], int) or config[key] < 1):
            raise UserError(f"{key}: got {config[key]}, expected a whole number from 1 on")
    most = config.template.get("max_nodes")
    if most is not None and config.nodes > most:
        others = "slurm, torchrun_nodes, skypilot, kubeflow or ray"
        raise UserError(f"nodes: got {config.nodes}, expected {most} for this launcher; choose launch={others}")


def own_keys() -> set[str]:
    """The keys that this command has and `ldm train` has not, for the chosen launcher."""
    chosen = HydraConfig.get().runtime.choices["launch"]
    with_launch = compose("launch", overrides=["~experiment", f"launch={chosen}"])
    return {str(key) for key in with_launch} - {str(key) for key in compose("train", overrides=["~experiment"])}


def refuse_without_effect(job: DictConfig, keys: Sequence[str]) -> None:
    """Refuses a setting that the chosen template does not ask for.

    Raises:
        UserError: there is one.
    """
    asked = OmegaConf.to_yaml(job.template)
    for key in keys:
        if key not in USED_HERE and not re.search(rf"\$\{{(literal:)?{key}\}}", asked):
            raise UserError(
                f"{key}: launch={HydraConfig.get().runtime.choices['launch']} has no place for it; leave it out"
            )


def placed(config: DictConfig, asked: Sequence[str]) -> list[str]:
    """The trainer's settings that nodes and GPUs decide.

    Raises:
        UserError: the command line sets one of them too.
    """
    for item in asked:
        key = item.lstrip("+~").partition("=")[0]
        if key in FOLLOWING:
            raise UserError(f"{item}: this follows from nodes and gpus_per_node; leave it out")
    accelerator = ["trainer.accelerator=gpu"] if config.trainer.accelerator == "auto" else []
    return [f"trainer.devices={config.gpus_per_node}", f"trainer.num_nodes={config.nodes}", *accelerator]


def check_training(overrides: Sequence[str]) -> DictConfig:
    """Composes the training's config as its processes will.

    Raises:
        UserError: an override is wrong, or there is nothing to train.
    """
    trained = compose_command("train", overrides)
    for part in ("model", "data"):
        if trained.get(part) is None:
            raise UserError(f"{part}: experiment {trained.name} sets none, so there is nothing to train")
    refuse_unread(trained, overrides)
    return trained


def shares(config: DictConfig, trained: DictConfig) -> list[str]:
    """What lets every process have a whole share of the global batch, in pieces that it can hold; the same steps.

    Raises:
        UserError: the batch does not divide.
    """
    size, processes = OmegaConf.select(trained, "data.batch_size"), config.nodes * config.gpus_per_node
    if not isinstance(size, int):
        return []
    if size % processes:
        below, above = size // processes * processes, (size // processes + 1) * processes
        nearest = " or ".join(f"data.batch_size={near}" for near in (below, above) if near)
        raise UserError(
            f"data.batch_size: got {size} for {processes} processes, expected a multiple of {processes}, "
            f"because it counts the samples of all of them together; the nearest: {nearest}"
        )
    share, most = size // processes, config.max_batch_per_gpu or size
    pieces = next(count for count in range(1, share + 1) if share % count == 0 and share // count <= most)
    if pieces == 1:
        return []
    if not takes_pieces(trained):
        raise UserError(
            f"max_batch_per_gpu: got {most} for an autoencoder, whose steps are of whole batches, expected at least "
            f"{share}, the share of a GPU; set data.batch_size={processes * most}, or more nodes"
        )
    return in_pieces(trained, pieces)


def strategy(config: DictConfig, trained: DictConfig) -> list[str]:
    """DDP for several processes, where nothing else is chosen."""
    return ["strategy=ddp"] if config.nodes * config.gpus_per_node > 1 and trained.strategy == "auto" else []


def check_run(overrides: Sequence[str]) -> tuple[RunFolder, list[str]]:
    """The run's folder, and the commands that it requires and that have not finished here.

    Raises:
        UserError: the config, or one of those that it requires, does not resolve.
    """
    register_resolver()
    trained, missing = compose_command("train", overrides), []
    with user_mistakes():
        for link in plan(trained):
            folder = RunFolder.of(link.config, command=link.command)
            remember(folder)
            missing += [] if folder.finished else [link.title]
        return RunFolder.of(trained, command="train"), missing


def render_overrides(job: DictConfig) -> list[str]:
    """The training's settings that the launcher itself asks for."""
    asked = literal(job.template.get("overrides"), job)
    return [f"{key}={value}" for key, value in (asked or {}).items()]


def fill(job: DictConfig, folder: RunFolder, *, words: Sequence[str]) -> None:
    """Puts what templates ask for, and no command line sets, into the launch's settings."""
    job.words = [escaped(word) for word in words]
    job.command = escaped(shlex.join(words))
    job.job = job_name(f"{folder.path.parent.name}-{folder.path.name}")
    job.processes = job.nodes * job.gpus_per_node
    job.gpus = None if folder.config.trainer.accelerator == "cpu" else job.gpus_per_node
    job.folder, job.runs = str(Path.cwd()), str(folder.config.paths.runs)
    if job.out:
        job.template.file = str(job.out)


def escaped(text: str) -> str:
    """A text that resolves to itself: what is an interpolation in an override is the training's, not the template's."""
    return re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + r"\${", text)


def job_name(text: str) -> str:
    """A name that every queue takes: small letters, digits and dashes, a letter first, 63 at most."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[-60:].lstrip("-")
    return name if name[:1].isalpha() else f"ldm-{name}"


def deliver(text: str, job: DictConfig) -> None:
    """Writes the file, or prints it.

    Raises:
        UserError: it cannot be written.
    """
    if not job.out:
        sys.stdout.write(text)
        return
    with user_mistakes():
        path = Path(job.out).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    say(f"wrote {path}")


def note(line: str) -> None:
    """A line for the reader, on standard error: standard output may be the file."""
    sys.stderr.write(f"{line}\n")


def _first_key(override: str) -> str:
    return re.split(r"[=.@]", override.lstrip("+~"))[0]


def _unresolved(config: DictConfig) -> Mapping[str, Any]:
    plain = OmegaConf.to_container(config, resolve=False)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}
