"""ADM's classifier of noisy samples: counts as published, attention that pools, one size."""

from pathlib import Path

import pytest
import torch
import yaml
from network_helpers import num_parameters, perturbed
from torch.testing import assert_close

from ldm.networks import NoisyClassifier
from ldm.networks.noisy_classifier import AttentionPool

CONF = Path(__file__).parents[2] / "conf" / "network"
SMALL = {"image_size": 16, "model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1, "num_head_channels": 16}


@pytest.mark.parametrize(("size", "millions"), [(64, 65), (128, 43), (256, 54), (512, 54)])
def test_counts_are_those_of_table_12(size: int, millions: int) -> None:
    node = yaml.safe_load((CONF / f"adm_{size}_classifier.yaml").read_text())
    with torch.device("meta"):
        classifier = NoisyClassifier(**{key: value for key, value in node.items() if key != "_target_"})
        assert classifier(torch.zeros(2, 3, size, size), torch.zeros(2)).shape == (2, 1000)
    assert round(num_parameters(classifier) / 1e6) == millions


def test_a_gradient_reaches_every_parameter_and_the_sample() -> None:
    torch.manual_seed(0)
    classifier = perturbed(NoisyClassifier(3, 5, attention_resolutions=[2], **SMALL))  # type: ignore[arg-type]
    x = torch.randn(2, 3, 16, 16, requires_grad=True)
    classifier(x, torch.tensor([1.0, 500.0])).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in classifier.parameters())
    assert x.grad is not None and x.grad.flatten(1).any(1).all()


def test_the_pool_asks_by_the_mean_of_all_pixels() -> None:
    torch.manual_seed(0)
    pool = AttentionPool(8, 3, side=2, num_heads=2).double()
    x = torch.randn(2, 8, 2, 2, dtype=torch.float64)
    pixels = x.flatten(2)
    tokens = torch.cat([pixels.mean(2, keepdim=True), pixels], 2) + pool.positional_embedding
    q, k, v = pool.qkv_proj(tokens).view(2, 3, 2, 4, 5).unbind(1)
    weights = (torch.einsum("bhd,bhdn->bhn", q[..., 0], k) / 2).softmax(-1)
    expected = pool.c_proj(torch.einsum("bhn,bhdn->bhd", weights, v).reshape(2, 8, 1))[..., 0]
    assert_close(pool(x), expected)


def test_another_size_is_refused() -> None:
    classifier = NoisyClassifier(3, 5, attention_resolutions=[2], **SMALL)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^got samples of 32x32, expected 16x16"):
        classifier(torch.zeros(1, 3, 32, 32), torch.zeros(1))
