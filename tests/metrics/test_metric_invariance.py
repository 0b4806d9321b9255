from pathlib import Path

import pytest
import torch
import yaml
from metric_helpers import METRICS, NUM_IMAGES, values
from torch.testing import assert_close

CONFIGS = Path(__file__).parents[2] / "conf/metric"


def test_every_metric_that_can_be_chosen_is_tested_here() -> None:
    chosen = {yaml.safe_load(file.read_text())["_target_"].rpartition(".")[2] for file in CONFIGS.glob("*.yaml")}
    assert chosen == {type(build()).__name__ for build, _ in METRICS.values()}


@pytest.mark.parametrize("name", METRICS)
def test_batches_of_7_and_of_64_give_one_value(name) -> None:
    places = torch.arange(NUM_IMAGES)
    assert_close(values(name, list(places.split(7))), values(name, list(places.split(64))), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", METRICS)
def test_order_does_not_matter(name) -> None:
    places = torch.randperm(NUM_IMAGES, generator=torch.Generator().manual_seed(1))
    expected = values(name, [torch.arange(NUM_IMAGES)])
    assert_close(values(name, list(places.split(30))), expected, rtol=1e-9, atol=1e-12)
    assert expected.isfinite().all()


@pytest.mark.parametrize("name", METRICS)
def test_values_are_float64(name) -> None:
    assert values(name, [torch.arange(NUM_IMAGES)]).dtype == torch.float64


@pytest.mark.parametrize("name", METRICS)
def test_state_that_was_saved_in_between_goes_on(name) -> None:
    build, feed = METRICS[name]
    places = torch.arange(NUM_IMAGES)
    first, second = build(), build()
    feed(first, places[:31])
    feed(second, places[31:])
    first.merge_state(second)
    result = first.compute()
    result = tuple(result.values()) if isinstance(result, dict) else result
    merged = torch.stack(result) if isinstance(result, tuple) else result[None]
    assert_close(merged, values(name, [places]), rtol=1e-9, atol=1e-12)
