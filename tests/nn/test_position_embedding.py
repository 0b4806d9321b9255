import math

import pytest
import torch

from ldm.nn.position import centred_positions, sincos_grid


def test_every_position_holds_sines_then_cosines_of_its_column_then_of_its_row() -> None:
    rows, columns = torch.tensor([0.0, 2.0, 5.5]), torch.tensor([1.0, 7.0])

    grid = sincos_grid(rows, columns, 8)

    for index, (row, column) in enumerate((row, column) for row in rows.tolist() for column in columns.tolist()):
        angles = [[value, value / 100] for value in (column, row)]
        expected = [f(angle) for pair in angles for f in (math.sin, math.cos) for angle in pair]
        torch.testing.assert_close(grid[index], torch.tensor(expected))


def test_the_product_of_two_positions_depends_on_their_offset_alone() -> None:
    grid = sincos_grid(torch.arange(6).double(), torch.arange(5).double(), 32).reshape(6, 5, 32)

    products = torch.einsum("rcd,d->rc", grid[1:], grid[1, 2])
    shifted = torch.einsum("rcd,d->rc", grid[:5], grid[0, 2])

    torch.testing.assert_close(products, shifted)
    assert (products.flatten().argmax() == 2).all()


def test_a_larger_grid_begins_with_the_smaller_one() -> None:
    small = sincos_grid(torch.arange(3.0), torch.arange(4.0), 16).reshape(3, 4, 16)
    large = sincos_grid(torch.arange(7.0), torch.arange(5.0), 16).reshape(7, 5, 16)
    torch.testing.assert_close(large[:3, :4], small, rtol=0, atol=0)


@pytest.mark.parametrize("dim", [0, 2, 6])
def test_a_width_that_does_not_hold_two_dimensions_is_refused(dim: int) -> None:
    with pytest.raises(ValueError, match=f"got {dim} channels .* multiple of 4"):
        sincos_grid(torch.arange(2.0), torch.arange(2.0), dim)


@pytest.mark.parametrize(("size", "first"), [(1, 3), (2, 3), (3, 2), (7, 0), (8, 0)])
def test_positions_are_taken_from_the_middle_of_the_grid(size: int, first: int) -> None:
    positions = centred_positions(size, max_positions=8, step=0.5)
    torch.testing.assert_close(positions, 0.5 * torch.arange(first, first + size).float())


def test_more_positions_than_the_grid_has_are_refused() -> None:
    with pytest.raises(ValueError, match="got 9 patches along a side, expected at most 8"):
        centred_positions(9, max_positions=8, step=1.0)
