"""Post-hoc EMA: averages of any length, made after training from snapshots of a few.

An average with a power-function profile gives the parameters of step tau, seen from step t, a weight proportional to
tau^gamma. Its length is told by sigma_rel, the standard deviation of the profile as a share of training: it grows with
training, so that nothing of the random start is left, and a few snapshots span the profiles of all lengths. From the
formulas of Karras et al. 2024 (EDM2), section 3 and appendix C.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.files import replacing
from ldm.training.checkpoint_files import StorageError
from ldm.training.ema import EMA, Module
from ldm.training.frozen import drop_frozen

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
METADATA = "post_hoc_ema"
# Of the largest coefficient: what less does to a sum in float32 cannot be seen.
NEGLIGIBLE = 1e-8
_NAME = re.compile(r"step=(\d+)-sigma_rel=[\d.e-]+\.safetensors")


def sigma_rel_of(gamma: float) -> float:
    """The relative width of the profile tau^gamma (EDM2, section 3.1)."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the profile of a relative width, the inverse of `sigma_rel_of`.

    Raises:
        ValueError: no profile that grows has this width; the widest, of exponent 0, has 0.2887.
    """
    if not 0 < sigma_rel <= sigma_rel_of(0):
        raise ValueError(f"got sigma_rel={sigma_rel}, expected more than 0 and at most 0.2886; 0.05 to 0.2 are usual")
    low, high = 0.0, 1 / sigma_rel
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if sigma_rel_of(middle) > sigma_rel else (low, middle)
    return low


@dataclass(frozen=True)
class Profile:
    """What an average is of: at `step`, the parameters of step tau have the density (g + 1) tau^g / step^(g + 1).

    Args:
        step: optimizer steps that went into it; that of the parameters after the first is 1.
        sigma_rel: its relative width.
    """

    step: int
    sigma_rel: float

    @property
    def gamma(self) -> float:
        """The exponent g."""
        return gamma_of(self.sigma_rel)


class PowerEMA(EMA[Module]):
    """A copy of `trained` whose parameters are their average with a power-function profile.

    In step t the average keeps the share beta(t) = (1 - 1/t)^(gamma + 1) of itself (EDM2, eq. 4); so the parameters of
    step k have the weight (k/t)^(gamma + 1) - ((k - 1)/t)^(gamma + 1), and those before the first step have none.
    Averages are of float32 at least, whatever is trained in.
    """

    def __init__(self, trained: Module, *, sigma_rel: float) -> None:
        super().__init__(trained, decay=0.0)
        self.sigma_rel, self.gamma = sigma_rel, gamma_of(sigma_rel)
        for parameter, p in zip(self.module.parameters(), trained.parameters(), strict=True):
            if p.requires_grad:
                parameter.data = parameter.data.to(torch.promote_types(p.dtype, torch.float32))

    def weight(self, num_updates: int) -> float:
        """Of the newest parameters in the average, 1 - beta(num_updates + 1)."""
        return 1.0 if num_updates == 0 else -math.expm1((self.gamma + 1) * math.log1p(-1 / (num_updates + 1)))


def inner_products(first: Sequence[Profile], second: Sequence[Profile]) -> Tensor:
    """The integrals (n, m) of the products of two profiles' densities, float64 (EDM2, appendix C).

    Of exponents a, b and steps s, t they are (a + 1)(b + 1) / (a + b + 1) * (m / s)^a (m / t)^b / max(s, t), m the
    smaller step.
    """
    a, s = _exponents_and_steps(first)
    b, t = _exponents_and_steps(second)
    a, s = a[:, None], s[:, None]
    m = torch.minimum(s, t)
    return (a + 1) * (b + 1) / (a + b + 1) * (m / s) ** a * (m / t) ** b / torch.maximum(s, t)


def coefficients(target: Profile, tracked: Sequence[Profile]) -> Tensor:
    """Those (n,), float64, with which a sum of tracked profiles comes nearest to the target's in least squares.

    They add up to one, which EDM2 leaves to the fit: parameters that training did not change stay what they are, and
    few snapshots do not shrink the rest.
    """
    scale = inner_products(tracked, tracked).diagonal().rsqrt()
    gram = inner_products(tracked, tracked) * scale[:, None] * scale
    right = inner_products(tracked, [target])[:, 0] * scale
    # The multiplier of the constraint is the last unknown.
    bordered = torch.cat([torch.cat([gram, scale[None]]), torch.cat([scale, scale.new_zeros(1)])[:, None]], dim=1)
    return torch.linalg.solve(bordered, torch.cat([right, right.new_ones(1)]))[:-1] * scale


def profile_error(target: Profile, tracked: Sequence[Profile], found: Tensor) -> float:
    """How far the sum of profiles is from the target's, relative to it, in the norm that was minimised."""
    own = inner_products([target], [target])[0, 0]
    cross = found @ inner_products(tracked, [target])[:, 0]
    square = own - 2 * cross + found @ inner_products(tracked, tracked) @ found
    return float((square.clamp_min(0) / own).sqrt())


@dataclass(frozen=True)
class Snapshot:
    """A file that holds one average.

    Args:
        path: of the file.
        profile: of the average.
        latest: names of its tensors that are no averages, such as buffers: those of that step.
    """

    path: Path
    profile: Profile
    latest: frozenset[str]


@dataclass(frozen=True)
class Reconstruction:
    """An average that was made of snapshots.

    Args:
        profile: that was asked for.
        state: its tensors, averages in float32.
        error: see `profile_error`.
        num_snapshots: how many it was made of.
    """

    profile: Profile
    state: dict[str, Tensor]
    error: float
    num_snapshots: int


def write_snapshot(folder: Path, module: nn.Module, *, profile: Profile, averaged: set[int], dtype: str) -> Path:
    """Writes an average's trained tensors, whole or not at all; the file says what it is.

    Args:
        averaged: the `id` of each parameter that is an average; the others are kept as they are.
        dtype: of the averages in the file: float32, float16 or bfloat16; float32 for one that float16 cannot hold.

    Raises:
        StorageError: the disk refused.
    """
    state = drop_frozen(module, module.state_dict(keep_vars=True))
    latest = [name for name, tensor in state.items() if id(tensor) not in averaged]
    tensors = {
        name: tensor.detach() if name in latest else _rounded(tensor.detach(), DTYPES[dtype])
        for name, tensor in state.items()
    }
    facts = {"step": profile.step, "sigma_rel": profile.sigma_rel, "latest": latest}
    path = folder / f"step={profile.step:09d}-sigma_rel={profile.sigma_rel}.safetensors"
    try:
        plain = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        with replacing(path) as temporary:
            save_file(plain, temporary, {METADATA: json.dumps(facts)})
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{path}: got {error}, expected room for a snapshot; make room, or set callback.post_hoc_ema.keep"
        ) from error
    return path


def written_snapshots(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the snapshots that have the names which `write_snapshot` gives, by step."""
    named = [(_NAME.fullmatch(path.name), path) for path in sorted(folder.glob("*.safetensors"))]
    return sorted((int(match[1]), path) for match, path in named if match)


def thinned(steps: Sequence[int], *, every_n_steps: int, keep: int) -> set[int]:
    """At most `keep` of the steps: the newest, and the multiples of every_n_steps * 2^k, k as small as will do.

    What is kept at a step is kept at each step before it too, so that a run that goes on from a checkpoint ends with
    the same snapshots.
    """
    newest, stride = max(steps, default=0), every_n_steps
    while newest // stride >= keep:
        stride *= 2
    return {step for step in steps if step % stride == 0 or step == newest}


def find_snapshots(folder: Path) -> list[Snapshot]:
    """All snapshots in a folder by step, each as it says itself what it is.

    Raises:
        ValueError: there is none, a file is none, or two are of the same profile.
    """
    found = sorted(
        map(read_facts, folder.glob("*.safetensors")), key=lambda one: (one.profile.step, one.profile.sigma_rel)
    )
    if not found:
        raise ValueError(f"got no snapshots in {folder}, expected some; train with +callback=post_hoc_ema")
    for one, other in itertools.pairwise(found):
        if one.profile == other.profile:
            raise ValueError(f"got {one.path} and {other.path}, two snapshots of one profile; remove one of them")
    return found


def read_facts(path: Path) -> Snapshot:
    """What a snapshot says about itself; reads no tensor.

    Raises:
        ValueError: it is damaged, or no snapshot.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"got {path}, which is damaged or not safetensors ({error}); remove it") from error
    if METADATA not in metadata:
        raise ValueError(f"got {path}, which is no snapshot, expected those of the post_hoc_ema callback; move it away")
    facts = json.loads(metadata[METADATA])
    return Snapshot(path, Profile(facts["step"], facts["sigma_rel"]), frozenset(facts["latest"]))


def reconstruct(snapshots: Sequence[Snapshot], *, sigma_rel: float, step: int | None = None) -> Reconstruction:
    """The average of any length at the step of a snapshot, of that snapshot and those before it.

    Holds one model in memory, not one a snapshot.

    Args:
        step: None is the newest.

    Raises:
        ValueError: there is no such profile or no snapshot of this step, or the snapshots are of different models.
    """
    steps = sorted({one.profile.step for one in snapshots})
    target = Profile(steps[-1] if step is None else step, sigma_rel)
    if target.step not in steps:
        near = min(steps, key=lambda one: abs(one - target.step))
        raise ValueError(
            f"got step={step}, expected that of a snapshot, {steps[0]} to {steps[-1]}; the nearest is {near}"
        )
    used = [one for one in snapshots if one.profile.step <= target.step]
    profiles = [one.profile for one in used]
    found = coefficients(target, profiles)
    error = profile_error(target, profiles, found)
    terms = [(c, one) for c, one in zip(found.tolist(), used, strict=True) if abs(c) > NEGLIGIBLE * found.abs().max()]
    newest = max(used, key=lambda one: one.profile.step)
    return Reconstruction(target, _combine(terms, newest), error, len(terms))


def _combine(terms: Sequence[tuple[float, Snapshot]], newest: Snapshot) -> dict[str, Tensor]:
    """The weighted sum of averages in float64, rounded to float32; other tensors are the newest snapshot's."""
    files = [safe_open(one.path, framework="pt") for _, one in terms]
    with safe_open(newest.path, framework="pt") as latest:
        names = list(latest.keys())
        for file, (_, one) in zip(files, terms, strict=True):
            if set(file.keys()) != set(names) or one.latest != newest.latest:
                raise ValueError(f"got {one.path} and {newest.path}, of different models, expected those of one run")
        state: dict[str, Tensor] = {}
        for name in names:
            if name in newest.latest:
                state[name] = latest.get_tensor(name).clone()
                continue
            total = torch.zeros(latest.get_slice(name).get_shape(), dtype=torch.float64)
            for file, (coefficient, _) in zip(files, terms, strict=True):
                total.add_(file.get_tensor(name), alpha=coefficient)
            state[name] = total.float()
    return state


def _exponents_and_steps(profiles: Sequence[Profile]) -> tuple[Tensor, Tensor]:
    gammas = {sigma_rel: gamma_of(sigma_rel) for sigma_rel in {profile.sigma_rel for profile in profiles}}
    rows = [(gammas[profile.sigma_rel], float(profile.step)) for profile in profiles]
    exponents, steps = torch.tensor(rows, dtype=torch.float64).unbind(1)
    return exponents, steps


def _rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in the type, or in float32 where a number would become infinite."""
    rounded = tensor.to(dtype)
    return tensor.float() if bool((rounded.isinf() & tensor.isfinite()).any()) else rounded
