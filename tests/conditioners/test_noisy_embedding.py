"""Embeddings of pictures under noise, as unCLIP tells them."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ldm.conditioners import NoisyEmbedding
from ldm.nn import timestep_embedding


def batch_of(embedding: Tensor, first: int = 0) -> dict[str, Any]:
    return {"image_embedding": embedding, "position": torch.arange(first, first + len(embedding))}


def vectors(conditioner: NoisyEmbedding, batch: dict[str, Any]) -> Tensor:
    found = conditioner(batch).vector
    assert found is not None
    return found


def test_the_embedding_is_under_the_noise_of_the_level_that_is_told() -> None:
    # Squares of the noisy embeddings of zeros are the variance of the level's noise, by squaredcos_cap_v2.
    dim, n = 512, 64
    found = vectors(NoisyEmbedding(dim, dropout=0.0), batch_of(torch.zeros(n, dim)))
    steps = torch.arange(1001, dtype=torch.float64) / 1000
    bar = torch.cos((steps + 0.008) / 1.008 * torch.pi / 2) ** 2
    alphas_cumprod = (1 - (1 - bar[1:] / bar[:-1]).clamp(max=0.999)).cumprod(0)
    table = timestep_embedding(torch.arange(1000), dim)
    levels = torch.cdist(found[:, dim:], table).argmin(1)
    assert_close(found[:, dim:], table[levels])
    assert levels.unique().numel() > n / 2
    variance = found[:, :dim].square().mean(1)
    assert_close(variance, (1 - alphas_cumprod[levels]).float(), rtol=0.35, atol=1e-3)


def test_the_signal_is_scaled_by_the_level() -> None:
    conditioner, batch = NoisyEmbedding(4, dropout=0.0), torch.full((16, 4), 1.0)
    once, twice = (vectors(conditioner, batch_of(batch * factor))[:, :4] for factor in (1.0, 2.0))
    scale = (twice - once)[:, 0]
    assert_close(twice - once, scale[:, None].expand(-1, 4), rtol=1e-3, atol=1e-6)
    assert (scale > 0).all() and (scale < 1).all() and scale.std() > 0.1


def test_what_is_drawn_depends_on_seed_and_position_alone() -> None:
    batch = batch_of(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
    whole = vectors(NoisyEmbedding(4), batch)
    assert torch.equal(vectors(NoisyEmbedding(4), batch_of(batch["image_embedding"][2:4], first=2)), whole[2:4])
    assert not torch.equal(vectors(NoisyEmbedding(4, seed=1), batch), whole)


@pytest.mark.parametrize(("dropout", "low", "high"), [(0.0, 0.0, 0.0), (0.25, 0.18, 0.32), (1.0, 1.0, 1.0)])
def test_zeros_stand_for_the_whole_vector_in_a_share_of_the_samples(dropout: float, low: float, high: float) -> None:
    found = vectors(NoisyEmbedding(4, dropout=dropout), batch_of(torch.ones(400, 4)))
    assert low <= (found == 0).all(1).float().mean() <= high


def test_nothing_known_is_zeros_of_the_same_width() -> None:
    with torch.device("meta"):
        # As where a model is only counted.
        null = NoisyEmbedding(4).null(3).vector
    assert null is not None and null.shape == (3, 8) and not null.any()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"caption": ["a"]}, "set derive=image_embedding"),
        (batch_of(torch.zeros(2, 6)), r"got image embeddings \(6,\), expected conditioner.dim=4"),
    ],
)
def test_what_does_not_fit_is_named(batch: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoisyEmbedding(4)(batch)


@pytest.mark.parametrize("arguments", [{"dim": 5}, {"dim": 0}, {"dropout": 1.5}])
def test_numbers_out_of_range_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"conditioner\.dim"):
        NoisyEmbedding(**arguments)
