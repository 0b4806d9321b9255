import pytest
import torch
from torch.testing import assert_close

from ldm.generation import SeededNoise
from ldm.generation.noise import BlendedNoise, slerp


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


def test_slerp_keeps_the_length_and_ends_where_it_should() -> None:
    start, end = SeededNoise([1, 2, 3], (4, 16, 16))(), SeededNoise([4, 5, 6], (4, 16, 16))()
    assert_close(slerp(start, end, torch.zeros(3)), start)
    assert_close(slerp(start, end, torch.ones(3)), end)
    middle = slerp(start, end, torch.tensor([0.3, 0.5, 0.8]))
    assert_close(middle.std((1, 2, 3)), torch.ones(3), rtol=0, atol=0.06)
    # The same noise twice is a point, not a circle.
    assert_close(slerp(start, start, torch.tensor([0.2, 0.5, 1.0])), start)


def test_slerp_goes_evenly_along_the_circle() -> None:
    start, end = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    middle = slerp(start, end, torch.tensor([1 / 3]))
    assert_close(middle, torch.tensor([[3**0.5 / 2, 2 / 2]]))


def test_blended_noise_is_each_seed_s_own_at_the_ends_of_every_draw() -> None:
    blended = BlendedNoise([1, 1, 7], (3, 4, 4), other_seeds=[2, 2, 7], amounts=[0.0, 1.0, 0.4])
    expected = SeededNoise([1, 2, 7], (3, 4, 4))
    for _ in range(3):
        assert_close(blended(), expected())
    assert_close(blended.draw((2, 5)), expected.draw((2, 5)))
