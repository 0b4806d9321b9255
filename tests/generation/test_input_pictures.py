"""Picture files of every kind become upright RGB, or one line that says what is wrong."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.generation.pictures import fitted, fitted_levels, read_levels, read_picture, to_image

RED, BLUE = (255, 0, 0), (0, 0, 255)


def save(picture: Image.Image, path: Path, **options: object) -> Path:
    picture.save(path, **options)
    return path


def two_colours(mode: str = "RGB") -> Image.Image:
    """4 wide, 2 high: red on the left, blue on the right."""
    drawn = Image.new("RGB", (4, 2), RED)
    drawn.paste(BLUE, (2, 0, 4, 2))
    return drawn.convert(mode)


def test_a_palette_and_grey_become_rgb(tmp_path: Path) -> None:
    palette = read_picture(save(two_colours("P"), tmp_path / "p.png"))
    assert (palette.mode, palette.getpixel((0, 0)), palette.getpixel((3, 1))) == ("RGB", RED, BLUE)
    grey = read_picture(save(Image.new("L", (2, 2), 77), tmp_path / "l.png"))
    assert (grey.mode, grey.getpixel((1, 1))) == ("RGB", (77, 77, 77))


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    clear = two_colours("RGBA")
    clear.putpixel((0, 0), (*RED, 0))
    picture = read_picture(save(clear, tmp_path / "a.png"))
    assert [picture.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), RED]


def test_sixteen_bits_are_scaled_and_as_levels_kept(tmp_path: Path) -> None:
    levels = np.array([[0, 257, 30000, 65535]], dtype=np.uint16)
    path = save(Image.fromarray(levels), tmp_path / "deep.png")
    assert np.asarray(read_picture(path))[0, :, 0].tolist() == [0, 1, 116, 255]
    assert read_levels(path, name="depth").tolist() == [[levels.tolist()]][0:1]


def test_exif_turns_a_picture_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right
    path = save(two_colours(), tmp_path / "turned.png", exif=exif)
    picture = read_picture(path)
    assert picture.size == (2, 4)
    assert (picture.getpixel((0, 0)), picture.getpixel((0, 3))) == (RED, BLUE)
    assert read_levels(path, name="depth").shape == (1, 1, 4, 2)


def test_images_are_in_minus_one_to_one() -> None:
    image = to_image(two_colours())
    assert image.shape == (1, 3, 2, 4)
    assert image[0, :, 0, 0].tolist() == [1, -1, -1]


def test_fitting_scales_to_cover_and_cuts_the_middle() -> None:
    wide = Image.new("RGB", (40, 10), RED)
    wide.paste(BLUE, (10, 0, 30, 10))
    cut = fitted(wide, (20, 40))
    assert cut.size == (40, 20)
    assert np.asarray(cut)[:, 8:-8].reshape(-1, 3).tolist() == [list(BLUE)] * 20 * 24
    levels = torch.from_numpy(np.asarray(wide)[None, None, :, :, 2] / 255)
    assert fitted_levels(levels, (20, 40), mode="nearest").mean() == 1
    assert fitted(wide, (10, 40)) is wide


def whole() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "mask: got file.png, where there is no file; expected a JPEG, PNG or WebP picture"),
        (b"", "mask: got file.png, which cannot be read (no picture)"),
        (b"hello", "mask: got file.png, which cannot be read (no picture)"),
        (whole()[:900], "mask: got file.png, which cannot be read (image file is truncated"),
        (whole()[:20], "mask: got file.png, which cannot be read ("),
        (b"<svg></svg>", "mask: got file.png, which cannot be read (no picture)"),
    ],
    ids=["missing", "empty", "text", "truncated", "header", "svg"],
)
def test_a_file_that_is_no_whole_picture_is_named(
    content: bytes | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("file.png").write_bytes(content)
    for read in (read_picture, read_levels):
        with pytest.raises(ValueError) as error:
            read("file.png", name="mask")
        assert str(error.value).startswith(message)
        assert "\n" not in str(error.value)
