"""One picture to one sample: sizes, colours, bytes."""

import io
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from picture_sources import encoded, picture
from PIL import Image, ImageCms

from ldm.data.making.area import reduce_area
from ldm.data.making.dropped import Dropped
from ldm.data.making.picture import Preparation, Prepared, prepare
from ldm.data.making.sources import Extent, Item

PNG = Preparation(image_format="png")


def prepared(content: bytes, preparation: Preparation = PNG, **item: Any) -> Prepared:
    outcome = prepare(Item("x", content, **{"caption": "x", **item}), preparation)
    assert isinstance(outcome, Prepared), outcome
    return outcome


def stored(content: bytes, preparation: Preparation = PNG) -> Image.Image:
    image = Image.open(io.BytesIO(prepared(content, preparation).sample.payload))
    image.load()
    return image


def reason(content: bytes, preparation: Preparation = PNG, **item: Any) -> str:
    outcome = prepare(Item("x", content, **{"caption": "x", **item}), preparation)
    assert isinstance(outcome, Dropped), outcome
    return outcome.reason


@pytest.mark.parametrize(
    ("before", "after"), [((10, 12), (5, 4)), ((7, 9), (7, 2)), ((9, 6), (2, 5)), ((8, 8), (8, 8))]
)
def test_each_pixel_is_the_mean_of_the_area_it_covers(before: tuple[int, int], after: tuple[int, int]) -> None:
    image = picture(1, before)
    fine = np.asarray(image, dtype=np.float64).repeat(after[1], axis=0).repeat(after[0], axis=1)
    means = fine.reshape(after[1], before[1], after[0], before[0], 3).mean(axis=(1, 3))
    np.testing.assert_allclose(np.asarray(reduce_area(image, after)), means, atol=0.501)


@pytest.mark.parametrize(
    ("options", "size", "columns"),
    [
        ({}, (24, 16), {}),
        ({"resolution": 8}, (12, 8), {}),
        ({"resolution": 8, "resize_filter": "lanczos"}, (12, 8), {}),
        ({"resolution": 32}, (24, 16), {}),
        ({"resolution": 32, "enlarge": True}, (48, 32), {}),
        ({"crop": "centre"}, (16, 16), {"crop_top": 0, "crop_left": 4, "target_height": 16, "target_width": 16}),
        (
            {"resolution": 8, "crop": "centre"},
            (8, 8),
            {"crop_top": 0, "crop_left": 2, "target_height": 8, "target_width": 8},
        ),
    ],
)
def test_the_short_side_is_scaled_and_the_centre_cut_out(
    options: dict[str, Any], size: tuple[int, int], columns: dict[str, int]
) -> None:
    content = encoded(picture(1), "PNG")
    outcome = prepared(content, Preparation(image_format="png", **options))
    assert Image.open(io.BytesIO(outcome.sample.payload)).size == size
    assert dict(outcome.sample.columns) == {**columns, "source_key": "x"}
    facts = outcome.sample.facts
    assert (facts["width"], facts["height"], facts["original_width"], facts["original_height"]) == (*size, 24, 16)


def test_the_filters_differ_and_the_cut_is_the_centre() -> None:
    content = encoded(picture(1, (30, 16)), "PNG")
    pixels = {
        name: np.asarray(stored(content, Preparation(resolution=8, resize_filter=name, image_format="png")))
        for name in ("area", "bicubic", "lanczos")
    }
    assert len({array.tobytes() for array in pixels.values()}) == 3
    cut = stored(content, Preparation(resolution=8, crop="centre", image_format="png"))
    np.testing.assert_array_equal(np.asarray(cut), pixels["area"][:, 3:11])


def test_a_resolution_keeps_the_aspect_ratio_to_half_a_pixel() -> None:
    for width in range(16, 60):
        size = stored(encoded(Image.new("RGB", (width, 16)), "PNG"), Preparation(resolution=8, image_format="png")).size
        assert abs(Fraction(size[0]) - Fraction(width, 2)) <= Fraction(1, 2)
        assert size[1] == 8


@pytest.mark.parametrize(
    ("image_format", "suffix", "stored_as"), [("jpg", "jpg", "JPEG"), ("png", "png", "PNG"), ("webp", "webp", "WEBP")]
)
def test_pictures_are_stored_in_the_format_asked_for(image_format: str, suffix: str, stored_as: str) -> None:
    sample = prepared(encoded(picture(1)), Preparation(image_format=image_format)).sample
    assert (sample.suffix, Image.open(io.BytesIO(sample.payload)).format) == (suffix, stored_as)


@pytest.mark.parametrize("image_format", ["jpg", "webp"])
def test_a_lower_quality_takes_fewer_bytes(image_format: str) -> None:
    content = encoded(picture(1, (64, 64)))
    low, high = (Preparation(image_format=image_format, quality=quality) for quality in (20, 95))
    assert len(prepared(content, low).sample.payload) < len(prepared(content, high).sample.payload)


@pytest.mark.parametrize(
    ("reencode", "options", "kept"),
    [
        ("always", {}, False),
        ("needed", {}, True),
        ("needed", {"resolution": 16, "crop": "none"}, True),
        ("needed", {"resolution": 8}, False),
        ("needed", {"crop": "centre"}, False),
        ("never", {}, True),
    ],
)
def test_bytes_are_kept_where_that_was_asked_for(reencode: str, options: dict[str, Any], kept: bool) -> None:
    content = encoded(picture(1), "WEBP")
    sample = prepared(content, Preparation(reencode=reencode, **options)).sample
    assert (sample.payload == content, sample.suffix) == (kept, "webp" if kept else "jpg")


@pytest.mark.parametrize("mode", ["CMYK", "L"])
def test_bytes_that_training_would_read_otherwise_are_kept_only_by_force(mode: str) -> None:
    content = encoded(picture(1, mode=mode))
    assert prepared(content, Preparation(reencode="needed")).sample.payload != content
    assert prepared(content, Preparation(reencode="never")).sample.payload == content


def test_a_format_that_shards_do_not_hold_is_converted() -> None:
    content = encoded(picture(1), "BMP")
    assert prepared(content, Preparation(reencode="needed")).sample.suffix == "jpg"
    assert reason(content, Preparation(reencode="never")) == "broken_image"


def test_a_picture_is_turned_upright_once() -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera lay on its side
    image = stored(encoded(picture(1), "PNG", exif=turned))
    assert image.getexif().get(0x0112, 1) == 1
    np.testing.assert_array_equal(np.asarray(image), np.asarray(picture(1).rotate(-90, expand=True)))


def test_transparency_is_laid_on_white() -> None:
    image = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    image.putpixel((1, 0), (200, 0, 0, 51))
    np.testing.assert_array_equal(np.asarray(stored(encoded(image, "PNG"))), [[[200, 0, 0], [244, 204, 204]]])


def test_a_transparent_colour_and_a_palette_are_followed() -> None:
    image = picture(1).quantize(7)
    np.testing.assert_array_equal(np.asarray(stored(encoded(image, "PNG"))), np.asarray(image.convert("RGB")))
    seen = np.asarray(stored(encoded(image, "PNG", transparency=image.getpixel((0, 0)))))
    assert seen[0, 0].tolist() == [255, 255, 255]


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    grey = Image.fromarray(np.array([[0, 257, 32896, 65535]], dtype=np.uint16))
    for image_format in ("PNG", "TIFF"):
        assert np.asarray(stored(encoded(grey, image_format)))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = stored(encoded(picture(1).convert(mode), "TIFF"))
    assert (image.mode, image.size) == ("RGB", (24, 16))


def test_the_first_of_several_frames_is_stored() -> None:
    frames = [picture(seed) for seed in (1, 2)]
    content = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    np.testing.assert_array_equal(np.asarray(stored(content)), np.asarray(frames[0]))


def swapped_profile() -> bytes:
    """An RGB profile whose red is sRGB's green and the other way round."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = profile.index(b"rXYZ"), profile.index(b"gXYZ")
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(profile)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_colour_profile_is_followed(mode: str) -> None:
    content = encoded(Image.new(mode, (4, 4), (200, 60, 20)), "PNG", icc_profile=swapped_profile())
    image = stored(content)
    assert "icc_profile" not in image.info
    np.testing.assert_allclose(np.asarray(image)[0, 0], [60, 200, 20], atol=2)


@pytest.mark.parametrize("profile", [b"junk", swapped_profile()], ids=["broken", "of another kind"])
def test_a_profile_that_does_not_fit_is_left_aside(profile: bytes) -> None:
    content = encoded(picture(1, mode="CMYK"), quality=100, icc_profile=profile)
    np.testing.assert_array_equal(
        np.asarray(stored(content)), np.asarray(stored(encoded(picture(1, mode="CMYK"), quality=100)))
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"<html>", "broken_image"),
        (encoded(picture(1, (300, 300)))[:-200], "broken_image"),
        (encoded(picture(1), "GIF")[:30], "broken_image"),
        (encoded(picture(1, (24, 7))), "tiny_image"),
        (encoded(Image.new("1", (8200, 8200)), "PNG"), "image_bomb"),
        (encoded(Image.new("1", (14000, 14000)), "PNG"), "image_bomb"),
        (None, "no_image"),
        (Extent("/nowhere"), "no_image"),
    ],
)
def test_what_cannot_be_read_has_a_reason(content: Any, expected: str) -> None:
    assert reason(content, Preparation(min_size=8)) == expected


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({"caption": ""}, "missing_caption"),
        ({"caption": None}, "missing_caption"),
        ({"caption": None, "columns": {"caption": None}}, "missing_caption"),
    ],
)
def test_a_caption_is_required_or_empty(item: dict[str, Any], expected: str) -> None:
    content = encoded(picture(1))
    assert reason(content, **item) == expected
    assert prepared(content, Preparation(captions="optional"), **item).sample.caption == ""


def test_a_file_that_is_too_large_is_not_read(tmp_path) -> None:
    path = tmp_path / "large.jpg"
    with path.open("wb") as stream:
        stream.truncate(2**27 + 1)
    assert reason(Extent(str(path))) == "oversized_member"


def test_columns_become_plain_and_keep_out_of_the_writers_way() -> None:
    row = {"width": 5, "score": float("nan"), "source_key": "mine", "caption": "x", "tags": ("a", b"bc"), "text": "x"}
    columns = prepared(encoded(picture(1)), columns=row, own={"is_prior": 0}).sample.columns
    assert columns == {
        "source_width": 5,
        "score": None,
        "source_source_key": "mine",
        "tags": ["a", "<2 bytes>"],
        "text": "x",
        "source_key": "x",
        "is_prior": 0,
    }


def test_chosen_columns_are_found_in_any_case_and_named_as_asked() -> None:
    row = {"AESTHETIC_SCORE": 5.5, "PWatermark": 0.1, "url": "u"}
    item = {"columns": row, "keep": ("aesthetic", "pwatermark")}
    columns = prepared(encoded(picture(1)), **item).sample.columns
    assert columns == {"aesthetic": 5.5, "pwatermark": 0.1, "source_key": "x"}
    with pytest.raises(ValueError, match="columns: got x without it: punsafe: there is no such column"):
        prepare(Item("x", encoded(picture(1)), caption="x", columns=row, keep=("punsafe",)), PNG)
