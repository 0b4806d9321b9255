import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from ldm.metrics import DigitReport, as_seen
from ldm.metrics.digits import half_of


class PixelJudge(nn.Module):
    """Reads digit, ink and paper off the levels of three pixels, and takes the row below as features."""

    num_features = 3

    def forward(self, images):
        levels = ((images[:, 0, 0] + 1) * 127.5).round().long()
        digit, ink, paper = (F.one_hot(levels[:, i], size).float() * 50 for i, size in enumerate((10, 6, 6)))
        return SimpleNamespace(digit=digit, ink=ink, paper=paper, features=images[:, 0, 1, :3] * 10)


def picture(digit: list[int], ink: list[int], paper: list[int], *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    image = torch.zeros(len(digit), 3, 2, 3)
    image[:, 0, 0] = torch.tensor([digit, ink, paper]).T / 127.5 - 1
    image[:, 0, 1] = torch.rand(len(digit), 3, generator=generator) * 2 - 1
    return image


def labels(digit: list[int], ink: list[int], paper: list[int], held_out: list[int]) -> dict[str, torch.Tensor]:
    columns = {"digit": digit, "ink": ink, "paper": paper, "held_out": held_out, "scan": list(range(len(digit)))}
    return {name: torch.tensor(values) for name, values in columns.items()}


def real_set(count: int, seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    digit, ink, paper = ([i % size for i in range(count)] for size in (10, 6, 5))
    return picture(digit, ink, paper, seed=seed), labels(digit, ink, paper, [i % 3 == 0 for i in range(count)])


def report_of(reals, generated) -> DigitReport:
    report = DigitReport(PixelJudge())
    report.update(*reals, real=True)
    report.update(*generated, real=False)
    return report


def test_accuracies_count_seen_and_held_out_combinations_apart() -> None:
    report = DigitReport(PixelJudge())
    images = picture([1, 2, 3, 4, 5], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1])
    truth = labels([1, 2, 9, 4, 9], [0, 0, 0, 0, 1], [1, 1, 2, 2, 2], [0, 0, 0, 1, 1])
    report.update(images, truth, real=False)
    values = report.compute()
    assert values["digit_accuracy_seen"] == pytest.approx(2 / 3)
    assert values["digit_accuracy_held_out"] == pytest.approx(1 / 2)
    assert values["ink_accuracy"] == pytest.approx(4 / 5)
    assert values["paper_accuracy"] == pytest.approx(2 / 5)
    assert math.isnan(values["real/digit_accuracy_seen"])


def test_diversity_is_the_mean_over_digits_of_the_unbiased_rms_distance() -> None:
    images, truth = real_set(60, 0)
    features = as_seen(images)[:, 0, 1] * 10
    spreads = [features[truth["digit"] == digit].double().var(dim=0).sum().sqrt() for digit in range(10)]
    values = report_of((images, truth), (images, truth)).compute()
    assert values["real/diversity"] == pytest.approx(torch.stack(spreads).mean().item(), rel=1e-6)


def test_wrong_digits_do_not_pass_as_diversity() -> None:
    images, truth = real_set(60, 0)
    stray, _ = real_set(10, 1)
    stray[:, 0, 1] = 1
    wrong = {name: (values[:10] + (name == "digit")) % 10 for name, values in truth.items()}
    clean = report_of((images, truth), (images, truth)).compute()
    mixed = {name: torch.cat([values, wrong[name]]) for name, values in truth.items()}
    dirty = report_of((images, truth), (torch.cat([images, stray]), mixed)).compute()
    assert dirty["diversity"] == pytest.approx(clean["diversity"], rel=1e-9)


def test_half_as_wide_features_have_half_the_diversity() -> None:
    images, truth = real_set(200, 0)
    narrow = images.clone()
    narrow[:, 0, 1] /= 2
    assert report_of((images, truth), (narrow, truth)).compute()["diversity_ratio"] == pytest.approx(0.5, abs=5e-3)


def test_the_real_images_themselves_are_at_distance_zero_with_ratio_one() -> None:
    values = report_of(real_set(60, 0), real_set(60, 0)).compute()
    assert values["frechet_distance"] < 1e-9
    assert values["diversity_ratio"] == pytest.approx(1)
    assert values["real/frechet_distance"] > 0


def test_sure_and_even_digits_have_inception_score_ten() -> None:
    values = report_of(real_set(60, 0), real_set(50, 1)).compute()
    assert values["inception_score"] == pytest.approx(10)
    assert values["real/inception_score"] == pytest.approx(10)


def test_batches_and_order_do_not_matter() -> None:
    (images, truth), generated = real_set(60, 0), real_set(50, 1)
    report = DigitReport(PixelJudge())
    report.update(*generated, real=False)
    for part in torch.randperm(60, generator=torch.Generator().manual_seed(0)).split(7):
        report.update(images[part], {name: values[part] for name, values in truth.items()}, real=True)
    assert_close(report.compute(), report_of((images, truth), generated).compute(), rtol=1e-9, atol=1e-9)


def test_two_ranks_merge_to_the_report_of_one() -> None:
    (images, truth), (fakes, prompts) = real_set(60, 0), real_set(50, 1)
    parts = [
        report_of(
            (images[part], {name: values[part] for name, values in truth.items()}),
            (fakes[part], {name: values[part] for name, values in prompts.items()}),
        )
        for part in (slice(0, 20), slice(20, None))
    ]
    parts[0].merge_state(parts[1])
    assert_close(parts[0].compute(), report_of((images, truth), (fakes, prompts)).compute(), rtol=1e-9, atol=1e-9)


def test_the_halves_are_even_within_runs_of_ten_scans() -> None:
    halves = half_of(torch.arange(1797))
    assert 0.47 < halves.double().mean() < 0.53
    for digit in range(10):
        assert 0.4 < halves[digit::10].double().mean() < 0.6


def test_all_renderings_of_a_scan_are_in_one_half() -> None:
    report = DigitReport(PixelJudge())
    images, truth = real_set(20, 0)
    report.update(images, truth | {"scan": torch.full((20,), 7)}, real=True)
    assert sorted(report.counts.tolist()) == [0, 0, 20]
