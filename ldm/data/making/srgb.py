"""Pictures of any kind as upright 8-bit sRGB: colour profiles, orientation, palettes, transparency, 16 bits."""

import io
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps

from ldm.data.shards import MAX_PIXELS

# What is decoded; others, such as EPS or PDF, start programs or take memory without bound.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
ORIENTATION = 0x0112


class TooManyPixelsError(ValueError):
    """A picture has more pixels than are ever decoded."""


def open_picture(content: bytes) -> Image.Image:
    """Decode bytes, a sequence's first frame; raises TooManyPixelsError before decoding, else what Pillow raises."""
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise TooManyPixelsError(f"got {image.width} x {image.height} pixels, expected at most {MAX_PIXELS}")
    image.load()
    return image


def is_plain(image: Image.Image) -> bool:
    """Say whether a decoded picture is upright RGB without a profile or transparency, as training reads it."""
    turned = image.getexif().get(ORIENTATION, 1) not in (0, 1)
    return image.mode == "RGB" and not turned and not image.info.get("icc_profile") and not image.has_transparency_data


def to_srgb(image: Image.Image) -> Image.Image:
    """Turn a picture upright and into 8-bit sRGB; transparency is laid on white.

    An embedded ICC profile is followed, with its own rendering intent; one that is broken, or of another kind of
    colour than the picture's, is left aside, as browsers do.
    """
    profile = image.info.get("icc_profile")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        flat = Image.new("RGB", layer.size, "white")
        flat.paste(_followed(layer.convert("RGB"), profile), mask=layer.getchannel("A"))
        return flat
    if image.mode not in ("RGB", "CMYK", "L", "LAB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    return _followed(image, profile)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale grey of 16 bits, or floats in [0, 1] or [0, 65535], to 8: Pillow itself would clip at 255."""
    values = np.asarray(image, dtype=np.float64)
    full = 1.0 if image.mode == "F" and values.max(initial=0) <= 1.0 else 65535.0
    return Image.fromarray(np.rint(values.clip(0, full) * (255.0 / full)).astype(np.uint8))


def _followed(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert an image to sRGB by its profile, where it has one that fits, else as Pillow does."""
    if profile:
        try:
            source, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
            intent = ImageCms.Intent(ImageCms.getDefaultIntent(source))
            converted: Any = ImageCms.profileToProfile(image, source, srgb, renderingIntent=intent, outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, ValueError):
            converted = None
        if converted is not None:
            return converted
    return image.convert("RGB")
