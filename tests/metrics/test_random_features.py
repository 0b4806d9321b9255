"""The stand-in for a feature network."""

import pytest
import torch
from torch.testing import assert_close

from ldm.metrics import RandomFeatures
from ldm.metrics.features import describe_network


def test_features_are_those_of_the_seed_and_tell_images_apart() -> None:
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = RandomFeatures(5, seed=3)(images)
    assert found.shape == (4, 5) and len(torch.unique(found[:, 0])) == 4
    assert_close(RandomFeatures(5, seed=3)(images), found, rtol=0, atol=0)
    assert not torch.equal(RandomFeatures(5, seed=4)(images), found)


def test_a_protocol_says_that_it_stands_in() -> None:
    assert describe_network(RandomFeatures(5)) == {
        "network": "ldm.metrics.RandomFeatures",
        "num_features": 5,
        "seed": 0,
    }
    with pytest.raises(ValueError, match="got num_features=0"):
        RandomFeatures(0)


def test_images_that_leave_nothing_to_spread_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 8 pixels"):
        RandomFeatures(5)(torch.zeros(2, 3, 4, 4))
    assert RandomFeatures(5)(torch.rand(2, 3, 8, 8)).isfinite().all()
