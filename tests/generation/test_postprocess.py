import numpy as np
import pytest
import torch
from PIL import Image

from ldm.generation import grid, to_pil


def test_minus_one_to_one_becomes_0_to_255_rounded_and_clipped() -> None:
    values = torch.tensor([-3.0, -1.0, 0.0, 1 / 255, 1.0, 1.01])
    (picture,) = to_pil(values.view(1, 1, 1, 6).expand(1, 3, 2, 6))
    assert (picture.mode, picture.size) == ("RGB", (6, 2))
    assert np.asarray(picture)[0, :, 0].tolist() == [0, 0, 128, 128, 255, 255]


def test_every_8_bit_picture_survives_the_round_trip() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), dtype=np.uint8)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    assert np.array_equal(np.stack([np.asarray(picture) for picture in to_pil(images)]), pixels)


@pytest.mark.parametrize(
    ("num_pictures", "num_columns", "size"),
    [(6, 3, (3, 2)), (5, None, (3, 2)), (4, None, (2, 2)), (1, None, (1, 1)), (2, 4, (4, 1))],
)
def test_a_grid_is_filled_row_by_row(num_pictures: int, num_columns: int | None, size: tuple[int, int]) -> None:
    pictures = [Image.new("RGB", (4, 3), (i, 0, 0)) for i in range(num_pictures)]
    sheet = grid(pictures, num_columns=num_columns, padding=1)
    columns, rows = size
    assert sheet.size == (columns * 5 + 1, rows * 4 + 1)
    for i in range(num_pictures):
        row, column = divmod(i, columns)
        assert sheet.getpixel((1 + column * 5, 1 + row * 4)) == (i, 0, 0)
    assert sheet.getpixel((0, 0)) == (255, 255, 255)
