"""Power-function averages, their closed forms, and averages of other lengths made of snapshots of a few."""

import json
import math
import random
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

from ldm.training.checkpoint_files import StorageError
from ldm.training.frozen import freeze
from ldm.training.post_hoc_ema import (
    PowerEMA,
    Profile,
    coefficients,
    find_snapshots,
    gamma_of,
    inner_products,
    profile_error,
    reconstruct,
    sigma_rel_of,
    thinned,
    write_snapshot,
    written_snapshots,
)

TRACKED = (0.05, 0.1)


def weights(step: int, sigma_rel: float) -> Tensor:
    """Those of the parameters after steps 1 to `step` in their average: the profile's integrals over each step."""
    ends = (torch.arange(step + 1, dtype=torch.float64) / step) ** (gamma_of(sigma_rel) + 1)
    return ends.diff()


def profiles(last: int, every: int, sigma_rels: tuple[float, ...] = TRACKED) -> list[Profile]:
    return [Profile(step, sigma_rel) for step in range(every, last + 1, every) for sigma_rel in sigma_rels]


class Walk(nn.Module):
    """Parameters that walk, others that are frozen, and a buffer."""

    def __init__(self, size: int = 6) -> None:
        super().__init__()
        self.walking = nn.Parameter(torch.full((size,), 3.0, dtype=torch.float64))
        self.fixed = nn.Parameter(torch.full((2,), 7.25, dtype=torch.float64), requires_grad=False)
        self.encoder = freeze(nn.Linear(2, 2))
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def step(self, generator: torch.Generator) -> None:
        self.walking += torch.randn(self.walking.shape, generator=generator, dtype=torch.float64)
        self.num_steps += 1


def snapshots_of_a_walk(
    folder: Path, *, last: int, every: int, sigma_rels: tuple[float, ...] = TRACKED, dtype: str = "float32"
) -> Tensor:
    """Tracks a walk and writes snapshots; returns its path (last, size)."""
    walk, generator = Walk(), torch.Generator().manual_seed(0)
    averages = [PowerEMA(walk, sigma_rel=sigma_rel) for sigma_rel in sigma_rels]
    path = []
    for step in range(1, last + 1):
        walk.step(generator)
        path.append(walk.walking.detach().clone())
        for average in averages:
            average.update(walk, num_updates=step - 1)
            if step % every == 0:
                profile, averaged = Profile(step, average.sigma_rel), {id(average.module.walking)}
                write_snapshot(folder, average.module, profile=profile, averaged=averaged, dtype=dtype)
    return torch.stack(path)


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_exponents_are_the_published_ones(sigma_rel: float, gamma: float) -> None:
    """EDM2, section 3.1."""
    assert round(gamma_of(sigma_rel), 2) == gamma


@pytest.mark.parametrize("sigma_rel", [1e-4, 0.01, 0.05, 0.1, 0.2, 0.28, 12**-0.5])
def test_a_width_names_its_exponent_and_the_exponent_the_width(sigma_rel: float) -> None:
    assert sigma_rel_of(gamma_of(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-13)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.289, math.nan])
def test_a_width_that_no_growing_profile_has_is_refused(sigma_rel: float) -> None:
    with pytest.raises(ValueError, match=f"^got sigma_rel={sigma_rel}, expected more than 0 and at most 0.2886"):
        gamma_of(sigma_rel)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.25])
def test_the_width_is_the_standard_deviation_of_the_weights_as_a_share_of_training(sigma_rel: float) -> None:
    times, w = torch.arange(1, 20001, dtype=torch.float64) / 20000, weights(20000, sigma_rel)
    mean = (w * times).sum()
    assert float((w * (times - mean) ** 2).sum().sqrt()) == pytest.approx(sigma_rel, rel=1e-4)


@pytest.mark.parametrize("sigma_rel", [0.02, 0.05, 0.1, 0.28])
def test_the_average_is_the_weighted_sum_of_all_parameters_after_a_step(sigma_rel: float) -> None:
    walk, generator = Walk(), torch.Generator().manual_seed(1)
    average = PowerEMA(walk, sigma_rel=sigma_rel)
    path = []
    for step in range(1, 301):
        walk.step(generator)
        path.append(walk.walking.detach().clone())
        average.update(walk, num_updates=step - 1)
        if step in (1, 2, 7, 300):
            assert_close(average.module.walking, weights(step, sigma_rel) @ torch.stack(path), rtol=0, atol=1e-10)


def test_averages_share_what_is_frozen_and_are_of_float32_where_half_is_trained() -> None:
    trained = nn.ModuleDict({"net": nn.Linear(3, 3).half(), "encoder": freeze(nn.Linear(3, 3).half())})
    average = PowerEMA(trained, sigma_rel=0.1)
    assert average.module["encoder"].weight is trained["encoder"].weight
    assert average.module["net"].weight.dtype == torch.float32
    average.update(trained, num_updates=0)
    assert_close(average.module["net"].weight, trained["net"].weight.float(), rtol=0, atol=0)


def test_inner_products_are_the_integrals_of_the_products() -> None:
    nodes, node_weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(200))

    def density(profile: Profile, tau: Tensor) -> Tensor:
        g = profile.gamma
        return (g + 1) * (tau / profile.step) ** g / profile.step

    tracked = [Profile(100, 0.05), Profile(100, 0.1), Profile(700, 0.2), Profile(1000, 0.28)]
    found = inner_products(tracked, tracked)
    for i, first in enumerate(tracked):
        for j, second in enumerate(tracked):
            end = min(first.step, second.step)
            tau = (nodes + 1) * end / 2
            expected = (node_weights * density(first, tau) * density(second, tau)).sum() * end / 2
            assert float(found[i, j]) == pytest.approx(float(expected), rel=1e-7)


@pytest.mark.parametrize("target", [Profile(4000, 0.05), Profile(4000, 0.1), Profile(1500, 0.1)])
def test_a_tracked_average_is_made_of_itself_alone(target: Profile) -> None:
    tracked = [profile for profile in profiles(4000, 100) if profile.step <= target.step]
    expected = torch.tensor([float(profile == target) for profile in tracked], dtype=torch.float64)
    found = coefficients(target, tracked)
    assert_close(found, expected, rtol=0, atol=1e-9)
    assert profile_error(target, tracked, found) < 1e-6


@pytest.mark.parametrize("sigma_rel", [0.03, 0.075, 0.15, 0.25])
@pytest.mark.parametrize(("last", "every"), [(40, 20), (4000, 500), (100000, 500)])
def test_coefficients_add_up_to_one(sigma_rel: float, last: int, every: int) -> None:
    assert float(coefficients(Profile(last, sigma_rel), profiles(last, every)).sum()) == pytest.approx(1, abs=1e-12)


@cache
def walks(last: int) -> Tensor:
    """200 random walks (last, 200) that start far from zero."""
    generator = torch.Generator().manual_seed(0)
    return 10 + torch.randn(last, 200, generator=generator, dtype=torch.float64).cumsum(0)


@pytest.mark.parametrize(
    ("every", "sigma_rel", "bound"),
    [
        (50, 0.04, 4e-4), (50, 0.06, 1e-4), (50, 0.075, 1e-4), (50, 0.15, 1e-4), (50, 0.2, 1e-3),
        (250, 0.04, 5e-2), (250, 0.06, 1e-2), (250, 0.075, 1e-2), (250, 0.15, 1e-2), (250, 0.2, 3e-2),
    ],
)  # fmt: skip
def test_a_made_average_of_random_walks_is_near_the_tracked_one(every: int, sigma_rel: float, bound: float) -> None:
    """Errors as shares of the distance between the average and the walks' ends, of 40 and of 8 pairs of snapshots."""
    last, tracked = 2000, profiles(2000, every)
    path = walks(last)
    kept = torch.stack([weights(one.step, one.sigma_rel) @ path[: one.step] for one in tracked])
    expected = weights(last, sigma_rel) @ path
    error = coefficients(Profile(last, sigma_rel), tracked) @ kept - expected
    assert float(error.square().mean().sqrt() / (expected - path[-1]).square().mean().sqrt()) < bound


def test_more_snapshots_fit_better_and_the_fit_is_told() -> None:
    target = Profile(4000, 0.15)
    errors = []
    for every in (1000, 500, 100):
        tracked = profiles(4000, every)
        errors.append(profile_error(target, tracked, coefficients(target, tracked)))
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[0] == pytest.approx(0.1, abs=0.01)


def test_reconstruction_from_files_is_the_average_that_was_not_tracked(tmp_path: Path) -> None:
    path = snapshots_of_a_walk(tmp_path, last=400, every=10)
    for sigma_rel in (0.06, 0.15):
        made = reconstruct(find_snapshots(tmp_path), sigma_rel=sigma_rel)
        expected = (weights(400, sigma_rel) @ path).float()
        assert_close(made.state["walking"], expected, rtol=0, atol=2e-4 * float(path.std()))
        assert made.profile == Profile(400, sigma_rel) and made.error < 1e-2


def test_half_precision_costs_no_more_than_its_rounding(tmp_path: Path) -> None:
    for dtype in ("float32", "float16", "bfloat16"):
        snapshots_of_a_walk(tmp_path / dtype, last=200, every=10, dtype=dtype)
    states = {
        dtype: reconstruct(find_snapshots(tmp_path / dtype), sigma_rel=0.12).state["walking"]
        for dtype in ("float32", "float16", "bfloat16")
    }
    size = float(states["float32"].abs().max())
    assert 0 < float((states["float16"] - states["float32"]).abs().max()) < 2**-10 * size
    assert 0 < float((states["bfloat16"] - states["float32"]).abs().max()) < 2**-7 * size
    files = {dtype: load_file(next((tmp_path / dtype).glob("*")))["walking"].dtype for dtype in states}
    assert files == {name: getattr(torch, name) for name in states}


def test_what_float16_cannot_hold_is_kept_in_float32(tmp_path: Path) -> None:
    walk = Walk()
    walk.walking.data.fill_(1e6)
    profile, averaged = Profile(1, 0.1), {id(walk.walking)}
    path = write_snapshot(tmp_path, walk, profile=profile, averaged=averaged, dtype="float16")
    assert_close(load_file(path)["walking"], torch.full((6,), 1e6), rtol=0, atol=0)


def test_what_is_no_average_is_the_newest_snapshots_and_frozen_modules_are_left_out(tmp_path: Path) -> None:
    snapshots_of_a_walk(tmp_path, last=60, every=20, dtype="float16")
    state = reconstruct(find_snapshots(tmp_path), sigma_rel=0.2, step=40).state
    assert set(state) == {"walking", "fixed", "num_steps"}
    assert state["num_steps"].dtype == torch.int64 and int(state["num_steps"]) == 40
    assert_close(state["fixed"], torch.full((2,), 7.25, dtype=torch.float64), rtol=0, atol=0)


def test_the_average_of_a_step_does_not_depend_on_later_training(tmp_path: Path) -> None:
    snapshots_of_a_walk(tmp_path / "short", last=100, every=20)
    snapshots_of_a_walk(tmp_path / "long", last=200, every=20)
    short = reconstruct(find_snapshots(tmp_path / "short"), sigma_rel=0.15)
    long = reconstruct(find_snapshots(tmp_path / "long"), sigma_rel=0.15, step=100)
    assert_close(short.state, long.state, rtol=0, atol=0)
    assert short.error == long.error


def test_a_snapshot_says_what_it_is_whatever_its_name(tmp_path: Path) -> None:
    snapshots_of_a_walk(tmp_path, last=20, every=10)
    (tmp_path / "step=000000010-sigma_rel=0.05.safetensors").rename(tmp_path / "mine.safetensors")
    found = find_snapshots(tmp_path)
    assert [one.profile for one in found] == profiles(20, 10)
    assert {one.latest for one in found} == {frozenset({"fixed", "num_steps"})}
    assert [step for step, _ in written_snapshots(tmp_path)] == [10, 20, 20]


def test_steps_without_a_snapshot_name_the_nearest(tmp_path: Path) -> None:
    snapshots_of_a_walk(tmp_path, last=30, every=10)
    with pytest.raises(ValueError, match=r"^got step=17, expected that of a snapshot, 10 to 30; the nearest is 20$"):
        reconstruct(find_snapshots(tmp_path), sigma_rel=0.1, step=17)


def test_files_that_are_no_whole_snapshots_of_one_run_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got no snapshots in .*, expected some"):
        find_snapshots(tmp_path / "nothing")
    snapshots_of_a_walk(tmp_path, last=20, every=10)
    stranger = tmp_path / "stranger.safetensors"
    save_file({"walking": torch.zeros(6)}, stranger)
    with pytest.raises(ValueError, match=r"stranger.safetensors, which is no snapshot"):
        find_snapshots(tmp_path)
    stranger.write_bytes(b"not much")
    with pytest.raises(ValueError, match=r"stranger.safetensors, which is damaged"):
        find_snapshots(tmp_path)
    facts = {"step": 10, "sigma_rel": 0.1, "latest": []}
    save_file({"other": torch.zeros(6)}, stranger, {"post_hoc_ema": json.dumps(facts)})
    with pytest.raises(ValueError, match="two snapshots of one profile"):
        find_snapshots(tmp_path)
    facts = {"step": 12, "sigma_rel": 0.1, "latest": []}
    save_file({"other": torch.zeros(6)}, stranger, {"post_hoc_ema": json.dumps(facts)})
    with pytest.raises(ValueError, match=r"stranger.safetensors and .* of different models"):
        reconstruct(find_snapshots(tmp_path), sigma_rel=0.15)


def test_a_disk_that_refuses_leaves_nothing_half_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    walk = Walk()
    with pytest.raises(StorageError, match=r"file/inner/step=000000003.*expected room for a snapshot"):
        write_snapshot(tmp_path / "file" / "inner", walk, profile=Profile(3, 0.1), averaged=set(), dtype="float32")
    (tmp_path / "step=000000003-sigma_rel=0.1.safetensors").mkdir()
    with pytest.raises(StorageError):
        write_snapshot(tmp_path, walk, profile=Profile(3, 0.1), averaged=set(), dtype="float32")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("keep", [2, 3, 8])
def test_thinning_keeps_few_evenly_spaced_steps_and_the_newest(keep: int) -> None:
    kept: set[int] = set()
    for step in [*range(5, 501, 5), 503]:
        kept = thinned(sorted({*kept, step}), every_n_steps=5, keep=keep)
        assert step in kept and len(kept) <= keep
        even = sorted(kept - {step})
        assert len({b - a for a, b in zip([0, *even], even, strict=False)}) <= 1
    assert len(kept) > keep / 2


def test_thinning_ends_alike_however_often_a_run_goes_back() -> None:
    def run(kept: set[int], begin: int, end: int) -> set[int]:
        kept = {step for step in kept if step <= begin}
        for step in range(begin + 5, end + 1, 5):
            kept = thinned(sorted({*kept, step}), every_n_steps=5, keep=6)
        return kept

    chance, kept, step = random.Random(0), set[int](), 0
    for _ in range(30):
        end = step + 5 * chance.randrange(20)
        kept, step = run(kept, step, end), max(0, end - 5 * chance.randrange(12))
    assert run(kept, step, 2000) == run(set(), 0, 2000)
