"""What counts as a spike: nothing on a clean run, every tall outlier, and a run of them to its end."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ldm.training.spikes import Spikes

NEVER = torch.tensor(False)


def noises(num_steps: int) -> dict[str, Tensor]:
    """Clean series (num_steps,) of many kinds, with tails up to a power law of index 3."""
    torch.manual_seed(0)
    normal, steps = torch.randn(num_steps), torch.arange(num_steps)
    t_3 = torch.distributions.StudentT(torch.tensor(3.0)).sample((num_steps,))
    return {
        "narrow": (0.1 * normal).exp(),
        "wide": (0.5 * normal).exp(),
        "very wide": normal.exp(),
        "Laplace": torch.distributions.Laplace(0.0, 0.3).sample((num_steps,)).exp(),
        "gamma": torch.distributions.Gamma(2.0, 1.0).sample((num_steps,)),
        "power law": 1 + 0.2 * t_3.abs(),
        "one in twenty is six times the others": (0.05 * normal).exp() * (1 + 5 * (torch.rand(num_steps) < 0.05)),
        "falling": (0.3 * normal).exp() * (1 + 20 * (-steps / 200).exp()),
        "rising": (0.3 * normal).exp() * (1 + steps / 500),
    }


def verdicts(spikes: Spikes, values: Tensor) -> Iterator[Tensor]:
    """The verdicts on steps of values (steps, series), each rejected where any of its series is a spike."""
    for row in values:
        verdict = spikes.judge(row)
        spikes.remember(row, verdict.any())
        yield verdict


def false_alarms(num_steps: int, *, kinds: slice = slice(None)) -> dict[str, int]:
    series = dict(list(noises(num_steps).items())[kinds])
    table = torch.stack(list(series.values()), 1)
    found = torch.stack(list(verdicts(Spikes(len(series)), table))).sum(0)
    return {name: int(count) for name, count in zip(series, found, strict=True) if count}


def test_clean_noise_raises_no_alarm_in_two_thousand_steps() -> None:
    assert false_alarms(2000) == {}


@pytest.mark.slow
def test_clean_noise_raises_no_alarm_in_twenty_thousand_steps() -> None:
    assert false_alarms(20000, kinds=slice(1, 7, 2)) == {}


@pytest.mark.parametrize("name", ["narrow", "wide", "Laplace", "power law", "rising"])
def test_fifty_times_the_median_stands_out(name: str) -> None:
    values = noises(600)[name][:, None]
    values[550] = 50 * values[450:550].median()
    assert [i for i, verdict in enumerate(verdicts(Spikes(1), values)) if verdict] == [550]


def test_nothing_is_judged_before_the_warm_up_is_over() -> None:
    values = torch.ones(30, 1)
    values[19], values[25] = 100, 100
    assert [i for i, verdict in enumerate(verdicts(Spikes(1, num_warmup=20), values)) if verdict] == [25]


def test_a_run_of_outliers_never_becomes_the_standard() -> None:
    spikes = Spikes(1, window=20, num_warmup=10)
    list(verdicts(spikes, torch.ones(20, 1)))
    assert all(verdicts(spikes, torch.full((100, 1), 30.0)))


def test_a_rare_and_regular_value_is_accepted_from_the_third_time_on() -> None:
    values = torch.ones(200, 1)
    values[50::20] = 30
    found = [i for i, verdict in enumerate(verdicts(Spikes(1, window=100, num_warmup=20), values)) if verdict]
    assert found == [50, 70]


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -5.0])
def test_what_is_not_a_positive_number_teaches_nothing(value: float) -> None:
    spikes = Spikes(1, window=20, num_warmup=10)
    list(verdicts(spikes, torch.linspace(1, 2, 20)[:, None]))
    before = spikes.state_dict()["past"]
    spikes.remember(torch.tensor([value]), NEVER)
    torch.testing.assert_close(spikes.state_dict()["past"], before, rtol=0, atol=0)


def test_a_loss_below_zero_raises_no_alarm() -> None:
    values = torch.randn(500, 1, generator=torch.Generator().manual_seed(0))
    assert not any(verdicts(Spikes(1), values))


def test_a_series_that_wakes_up_makes_all_start_anew() -> None:
    """A discriminator joins: its own norm appears, and the loss is another from that step on."""
    loss, norm = torch.ones(200), torch.zeros(200)
    loss[100:], norm[100:] = 40, 1
    assert not torch.stack(list(verdicts(Spikes(2, num_warmup=20), torch.stack([loss, norm], 1)))).any()


def test_a_norm_that_was_zero_for_a_step_changes_nothing() -> None:
    values = torch.ones(60, 2)
    values[40, 1], values[50, 0] = 0, 100
    found = torch.stack(list(verdicts(Spikes(2, num_warmup=20), values)))
    assert found.nonzero().tolist() == [[50, 0]]


def test_restored_statistics_give_the_same_verdicts() -> None:
    values = noises(400)["power law"][:, None]
    values[210::10] *= 400
    whole = list(verdicts(Spikes(1), values))
    first, second = Spikes(1), Spikes(1)
    begun = list(verdicts(first, values[:211]))
    second.load_state_dict(first.state_dict())
    assert begun + list(verdicts(second, values[211:])) == whole
    assert 2 <= sum(map(int, whole)) < 19


@pytest.mark.parametrize(
    "settings", [{"num_warmup": 1}, {"window": 150}, {"factor": 1.0}, {"num_deviations": 0.0}], ids=str
)
def test_a_setting_out_of_range_is_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings)).replace('window', 'num_warmup')}.*expected"):
        Spikes(1, **settings)
