import pytest
import torch
from torch.testing import assert_close

from ldm.generation import SeededNoise


def test_a_row_depends_on_its_own_seed_alone() -> None:
    many, one = SeededNoise([3, 1, 2], (2, 4, 4)), SeededNoise([1], (2, 4, 4))
    for _ in range(3):
        assert_close(many()[1:2], one(), rtol=0, atol=0)


def test_equal_seeds_give_equal_rows_and_others_differ() -> None:
    noise = SeededNoise([7, 7, 8], (2, 16, 16))()
    assert torch.equal(noise[0], noise[1])
    assert abs(torch.corrcoef(noise.flatten(1))[0, 2].item()) < 0.2


def test_every_draw_is_new_standard_normal_noise() -> None:
    noise = SeededNoise(range(50), (1, 16, 16))
    first, second = noise(), noise()
    assert abs(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1].item()) < 0.03
    assert_close(torch.stack([first.mean(), first.std()]), torch.tensor([0.0, 1.0]), rtol=0, atol=0.03)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_that_would_share_a_picture_with_another_are_refused(seed: int) -> None:
    """Torch's generator takes seeds modulo 2^32."""
    with pytest.raises(ValueError, match=rf"^got seed {seed}, expected an integer from 0 to 4294967295"):
        SeededNoise([0, seed], (1, 2, 2))
