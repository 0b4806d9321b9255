import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from ldm.autoencoders import VectorQuantizer, quantizer


def quantizer_of(entries: list[list[float]], **weights: float) -> VectorQuantizer:
    made = VectorQuantizer(len(entries), len(entries[0]), **weights)
    made.embedding.weight.data = torch.tensor(entries)
    return made


def latents(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_every_latent_becomes_its_nearest_entry() -> None:
    made = quantizer_of([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
    z = torch.tensor([[0.4, 0.6, -5.0], [0.1, 0.1, 4.0]]).reshape(1, 2, 1, 3)

    found = made(z)

    assert found.codes.tolist() == [[[0, 1, 2]]]
    assert_close(found.latents, torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 3.0]]).reshape(1, 2, 1, 3))


@given(num_codes=st.integers(1, 40), channels=st.integers(1, 5), limit=st.integers(1, 300), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_codes_are_those_of_all_distances_however_many_are_held_at_once(
    num_codes: int, channels: int, limit: int, seed: int
) -> None:
    made = VectorQuantizer(num_codes, channels).double()
    made.embedding.weight.data = latents(num_codes, channels, seed=seed + 100)
    z = latents(2, channels, 3, 5, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantizer, "MAX_DISTANCES", limit)

        codes = made.codes(z)

    distances = torch.cdist(z.permute(0, 2, 3, 1).reshape(-1, channels), made.embedding.weight)
    assert_close(codes.flatten(), distances.argmin(1))


def test_an_entry_is_its_own_nearest() -> None:
    made = VectorQuantizer(64, 3)
    codes = torch.arange(64).reshape(1, 8, 8)

    found = made(made.entries(codes))

    assert_close(found.codes, codes)
    assert_close(found.loss, torch.tensor(0.0))


def test_gradient_passes_straight_through() -> None:
    made, z = VectorQuantizer(16, 3).double(), latents(2, 3, 4, 4).requires_grad_()
    weight = latents(2, 3, 4, 4, seed=1)

    (found,) = torch.autograd.grad((made(z).latents * weight).sum(), z)

    assert_close(found, weight)


@pytest.mark.parametrize(("codebook", "commitment"), [(0.25, 1.0), (1.0, 0.25)])
def test_loss_is_codebook_and_commitment_each_pulling_one_side(codebook: float, commitment: float) -> None:
    made = VectorQuantizer(16, 3, codebook_weight=codebook, commitment_weight=commitment).double()
    z = latents(2, 3, 4, 4).requires_grad_()

    found = made(z)
    of_latents, of_codebook = torch.autograd.grad(found.loss, [z, made.embedding.weight])

    entries = made.entries(found.codes).detach()
    assert_close(found.loss, (codebook + commitment) * (z - entries).square().mean())
    assert_close(of_latents, commitment * 2 * (z - entries) / z.numel())
    pulls = torch.zeros_like(of_codebook).index_add_(
        0, found.codes.flatten(), (2 * (entries - z) / z.numel()).permute(0, 2, 3, 1).reshape(-1, 3)
    )
    assert_close(of_codebook, codebook * pulls)


def test_the_published_placement_of_beta_is_the_default() -> None:
    made = VectorQuantizer(16, 3)

    assert (made.codebook_weight, made.commitment_weight) == (0.25, 1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_latents_are_compared_in_float32(dtype: torch.dtype) -> None:
    """Entries that are one value when rounded to half precision stay apart."""
    made = quantizer_of([[1.0, 0.0], [1.0 + 2**-12, 0.0]])
    z = torch.tensor([4.0, 0.0]).reshape(1, 2, 1, 1).to(dtype)

    with torch.autocast("cpu", dtype=dtype):
        found = made(z)

    assert found.codes.item() == 1
    assert (found.latents.dtype, found.loss.dtype) == (dtype, torch.float32)


def test_a_quantizer_that_cannot_learn_is_refused() -> None:
    with pytest.raises(ValueError, match="got num_codes=0, expected at least 1"):
        VectorQuantizer(0, 3)
    with pytest.raises(ValueError, match=r"commitment_weight=0\.0, expected both positive"):
        VectorQuantizer(4, 3, commitment_weight=0.0)


def test_quantising_is_counted_on_the_meta_device() -> None:
    with torch.device("meta"):
        found = VectorQuantizer(16, 3)(torch.empty(2, 3, 4, 5))
    assert (found.latents.shape, found.codes.shape, found.latents.is_meta) == ((2, 3, 4, 5), (2, 4, 5), True)
