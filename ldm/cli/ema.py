"""`ldm ema`: an average of any length becomes weights to use, made of the snapshots of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig, OmegaConf

from ldm.cli.chain import shown
from ldm.cli.console import heading, say
from ldm.cli.errors import UserError, user_mistakes
from ldm.cli.run_folder import latest_finished, run_folder_of

if TYPE_CHECKING:
    from ldm.training.post_hoc_ema import Reconstruction

SNAPSHOTS = "snapshots"
# Of the profile, from which on the user should know.
NOTABLE_ERROR = 0.05


def ema(config: DictConfig, overrides: Sequence[str]) -> None:
    """Makes the average of `sigma_rel` at `step`, writes it and says how well it fits.

    Raises:
        UserError: there is no such run or snapshot, or a setting is wrong.
    """
    folder = find_run(config)
    refuse_out(config.out)
    # Torch takes seconds to import: only from here on is it needed.
    from ldm.nn.weights import save_weights
    from ldm.training.post_hoc_ema import find_snapshots, reconstruct

    with user_mistakes():
        snapshots = find_snapshots(snapshots_of(folder))
        made = reconstruct(snapshots, sigma_rel=config.sigma_rel, step=config.step)
        out = Path(str(config.out)).expanduser() if config.out else default_out(folder, made)
        target, own = description(folder)
        facts = {"sigma_rel": made.profile.sigma_rel, "step": made.profile.step, "error": made.error}
        save_weights(out, made.state, target=target, config={**own, "post_hoc_ema": facts})
    report(made, out, num_snapshots=len(snapshots))


def averaged(folder: Path, sigma_rel: float) -> Path:
    """The weights of a run's average of this length at its newest snapshot; made, unless an earlier call did.

    Raises:
        UserError: the run has no snapshots, or there is no such length.
    """
    from ldm.training.post_hoc_ema import find_snapshots

    with user_mistakes():
        step = max(one.profile.step for one in find_snapshots(snapshots_of(folder)))
    out = folder / "ema" / f"sigma_rel_{sigma_rel}_step_{step}.safetensors"
    if not out.is_file():
        ema(OmegaConf.create({"run": str(folder), "sigma_rel": sigma_rel, "step": step, "out": None}), [])
    return out


def find_run(config: DictConfig) -> Path:
    """The folder of the run that `run=` names, or of the newest finished one with snapshots.

    Raises:
        UserError: there is none.
    """
    if config.run is not None:
        path = Path(str(config.run)).expanduser()
        folder = run_folder_of(path.absolute()) if path.exists() else None
        if folder is None:
            raise UserError(f"run: got {path}, expected a run folder, such as runs/quickstart/1a2b3c4d; check the path")
        return folder
    runs = Path(config.paths.runs).expanduser()
    found = latest_finished(runs, accept=lambda folder: any(snapshots_of(folder).glob("*.safetensors")))
    if found is None:
        raise UserError(
            f"run: got none, and no finished run under {runs.absolute()} has snapshots; train with "
            "+callback=post_hoc_ema, or give run=..."
        )
    return found


def snapshots_of(folder: Path) -> Path:
    """Where a run's snapshots are: beside its other files, unless its config says otherwise."""
    own = folder / SNAPSHOTS
    if own.is_dir():
        return own
    said = OmegaConf.select(OmegaConf.load(folder / "config.yaml"), "callback.post_hoc_ema.folder")
    return Path(said) if said else own


def refuse_out(out: str | None) -> None:
    """Raises UserError for a file that is no weights file by its name, or that exists."""
    if out is None:
        return
    if Path(out).suffix != ".safetensors":
        raise UserError(f"out: got {out}, expected NAME.safetensors")
    if Path(out).expanduser().exists():
        raise UserError(f"out: got {out}, which exists already, expected a new path; name another, or remove it")


def default_out(folder: Path, made: Reconstruction) -> Path:
    """A file in the run folder that says what it holds, without signs that mean something in a sweep."""
    return folder / "ema" / f"sigma_rel_{made.profile.sigma_rel}_step_{made.profile.step}.safetensors"


def description(folder: Path) -> tuple[str, dict[str, Any]]:
    """(class, config) of what the run trains: as its own weights say, or, where there are none yet, its config."""
    from safetensors import safe_open

    weights = folder / "weights.safetensors"
    if weights.is_file():
        with safe_open(weights, framework="pt") as file:
            metadata = file.metadata()
        return metadata["target"], json.loads(metadata["config"])
    config = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")))
    return "ldm.training.LatentDiffusionModule", config


def report(made: Reconstruction, out: Path, *, num_snapshots: int) -> None:
    """Says what was made of what, and how near its profile is to the one asked for."""
    heading(f"sigma_rel {made.profile.sigma_rel} at step {made.profile.step}: {shown(out.absolute())}")
    say(f"  gamma       {made.profile.gamma:.2f}")
    say(f"  snapshots   {made.num_snapshots} of {num_snapshots}")
    say(f"  profile     {100 * made.error:.2g} % off")
    if made.error > NOTABLE_ERROR:
        say(
            "  so few snapshots do not tell this length; take one nearer to those that were tracked, or train with a "
            "smaller callback.post_hoc_ema.every_n_steps",
            style="yellow",
        )
