from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ldm.generation.postprocess import to_pil
from ldm.metrics import ClassifierFeatures, FrechetDistance, as_seen, describe_network, quantize


def test_quantize_gives_the_pixels_of_the_png() -> None:
    images = torch.rand(2, 3, 8, 8) * 2.6 - 1.3
    pixels = np.stack([np.asarray(picture) for picture in to_pil(images)])
    assert_close(quantize(images).permute(0, 2, 3, 1), torch.from_numpy(pixels))


@pytest.mark.parametrize(("value", "level"), [(-1.01, 0), (1.01, 255), (-1.0, 0), (1.0, 255), (0.0, 128), (0.002, 128)])
def test_quantize_clamps_and_rounds_where_a_cast_would_wrap(value: float, level: int) -> None:
    assert quantize(torch.full((1, 3, 1, 1), value)).unique().tolist() == [level]


def test_an_image_that_was_seen_once_looks_the_same_again() -> None:
    seen = as_seen(torch.rand(4, 3, 8, 8) * 2 - 1)
    assert_close(as_seen(seen), seen, atol=0, rtol=0)


def test_classifier_features_take_the_named_output() -> None:
    class Judge(nn.Module):
        def forward(self, images):
            return SimpleNamespace(features=images.mean((2, 3)), digit=images.amax((2, 3)))

    images = torch.rand(2, 3, 4, 4)
    network = ClassifierFeatures(Judge(), output="digit", num_features=3)
    assert_close(network(images), images.amax((2, 3)))


def test_a_feature_network_that_hides_its_size_is_refused() -> None:
    with pytest.raises(ValueError, match="integer `num_features`"):
        FrechetDistance(nn.Flatten())


def test_a_network_that_says_nothing_of_itself_is_known_by_its_tensors() -> None:
    first, second = nn.Linear(2, 3), nn.Linear(2, 3)
    described = describe_network(first)
    assert described["network"] == "torch.nn.modules.linear.Linear"
    assert described["sha256"] != describe_network(second)["sha256"]
    second.load_state_dict(first.state_dict())
    assert described == describe_network(second)


def test_a_network_that_describes_itself_is_believed() -> None:
    network = nn.Linear(2, 3)
    network.describe = lambda: {"network": "mine"}
    assert describe_network(network) == {"network": "mine"}
