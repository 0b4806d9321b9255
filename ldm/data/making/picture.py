"""One picture of a source to one sample of a shard: a pure function of the two and of how pictures are prepared."""

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image, UnidentifiedImageError

from ldm.data.expressions import is_null
from ldm.data.making.area import reduce_area
from ldm.data.making.dropped import Dropped, DroppedError
from ldm.data.making.sources import SIZE, Extent, Item, kept_columns, parse_object
from ldm.data.making.srgb import TooManyPixelsError, is_plain, open_picture, to_srgb
from ldm.data.rows import ColumnNames, MissingColumnError, pixels_stated
from ldm.data.shards import MAX_BYTES
from ldm.data.similar import difference_hash
from ldm.data.writer import SUFFIX_OF, Record, Sample, check_format, image_sample

FILTERS = {
    "area": Image.Resampling.BICUBIC,  # area only reduces; what grows is interpolated
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
CHOICES = {
    "resize_filter": tuple(FILTERS),
    "crop": ("none", "centre"),
    "reencode": ("always", "needed", "never"),
    "captions": ("required", "optional"),
    "duplicates": ("keep", "sha256", "perceptual"),
}


@dataclass(frozen=True)
class Preparation:
    """How pictures become upright 8-bit sRGB, following their ICC profile, transparency on white, and are stored.

    Args:
        resolution: pixels to which the short side is reduced; None leaves the size.
        resize_filter: area (each pixel the mean of what it covers), bicubic or lanczos.
        enlarge: whether a smaller picture is scaled up to the resolution.
        crop: "none", or "centre" for the square in the middle.
        reencode: "always"; "needed" keeps the bytes of pictures that are not changed, whatever their format, and
            "never" those of all, which then keep their size, orientation and colours.
        image_format, quality: jpg, png or webp; 1 to 100, of jpg and webp.
        min_size: pixels; a picture with a shorter side is dropped.
        captions: "required" drops pictures without one, "optional" gives them the empty one.
        duplicates: "keep"; "sha256" drops pictures of the same bytes in the source, "perceptual" those whose
            64-bit difference hash is near one that was written before.

    Raises:
        ValueError: no choice, out of range, or not to be had together.
    """

    resolution: int | None = None
    resize_filter: str = "area"
    enlarge: bool = False
    crop: str = "none"
    reencode: str = "always"
    image_format: str = "jpg"
    quality: int = 95
    min_size: int = 0
    captions: str = "required"
    duplicates: str = "keep"

    def __post_init__(self) -> None:
        for option, choices in CHOICES.items():
            if getattr(self, option) not in choices:
                raise ValueError(f"{option}: got {getattr(self, option)!r}, expected one of {', '.join(choices)}")
        check_format(self.image_format, self.quality)
        if self.resolution is not None and self.resolution < 1:
            raise ValueError(f"resolution: got {self.resolution}, expected pixels, as in 512, or null")
        if self.min_size < 0:
            raise ValueError(f"min_size: got {self.min_size}, expected 0 or more pixels")
        if self.reencode == "never" and (self.resolution is not None or self.crop != "none"):
            raise ValueError(
                f"reencode: got never with resolution={self.resolution} and crop={self.crop}, expected neither; "
                "set dataset.reencode=needed, which keeps the bytes of pictures that need no change"
            )

    @property
    def hash_bytes(self) -> int:
        """How many bytes a picture's hash has, by which duplicates are found."""
        return {"keep": 0, "sha256": 32, "perceptual": 8}[self.duplicates]


@dataclass(frozen=True)
class Prepared:
    """A sample ready to be written, and the hash by which its duplicates are found."""

    source: str
    sample: Sample
    hash: bytes


def prepare(item: Item, preparation: Preparation) -> Prepared | Dropped:
    """Read, convert and encode one picture with its caption and columns, or say why it is left out."""
    if item.dropped is not None:
        return Dropped(item.name, *item.dropped)
    try:
        row = _row(item)
        caption = _caption(item, row)
        if not caption and preparation.captions == "required":
            raise DroppedError("missing_caption", item.without_caption)
        content = _content(item)
        record, digest = _record(content, preparation)
    except DroppedError as error:
        return Dropped(item.name, error.reason, str(error))
    columns = {**kept_columns(item, row, caption=caption), **record.columns}
    size = _original_size(row) or record.original_size
    record = Record(record.image, caption, columns, original_size=size)
    sample = image_sample(record, image_format=preparation.image_format, quality=preparation.quality)
    return Prepared(item.name, sample, digest)


def _content(item: Item) -> bytes:
    """Return the encoded picture; raises DroppedError where it is not there or too large."""
    if item.image is None:
        raise DroppedError("no_image", "got no picture, expected one")
    try:
        if len(item.image) > MAX_BYTES["png"]:
            detail = f"got {len(item.image)} bytes, expected at most {MAX_BYTES['png']}"
            raise DroppedError("oversized_member", detail)
        return item.image.read() if isinstance(item.image, Extent) else item.image
    except OSError as error:
        raise DroppedError("no_image", f"got no file that can be read ({error.strerror or error})") from error


def _row(item: Item) -> Mapping[str, Any]:
    if not isinstance(item.columns, Extent):
        return item.columns
    try:
        return parse_object(item.columns.read())
    except UnicodeDecodeError as error:
        raise DroppedError("not_utf8", f"got json that is not UTF-8 ({error})") from error
    except (ValueError, OSError, RecursionError) as error:
        raise DroppedError("broken_json", f"got json that cannot be read ({error})") from error


def _caption(item: Item, row: Mapping[str, Any]) -> str:
    """Return the caption, "" where there is none; raises DroppedError for a text that cannot be read."""
    if isinstance(item.caption, str):
        return item.caption
    try:
        if item.caption is not None:
            return item.caption.read().decode().strip()
        value = row[ColumnNames().find(item.caption_column, tuple(row))]
    except MissingColumnError:
        return ""
    except UnicodeDecodeError as error:
        raise DroppedError("not_utf8", f"got a caption that is not UTF-8 ({error})") from error
    except OSError as error:
        raise DroppedError("missing_caption", f"got a caption that cannot be read ({error})") from error
    return "" if is_null(value) else str(value).strip()


def _original_size(row: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the (width, height) that img2dataset saw before it resized the picture, where the row says it."""
    width, height = (pixels_stated(row.get(name)) for name in SIZE)
    return (width, height) if width and height else None


def _record(content: bytes, preparation: Preparation) -> tuple[Record, bytes]:
    """Return the picture as it is to be stored, without its caption, and its hash; raises DroppedError."""
    image, upright = _decoded(content)
    if min(upright.size) < max(1, preparation.min_size):
        raise DroppedError("tiny_image", f"got {upright.size[0]} x {upright.size[1]}, below {preparation.min_size}")
    digest = _hash(content, upright, preparation)
    scaled = _resized(upright, preparation)
    cut, columns = _cropped(scaled, preparation)
    is_unchanged = is_plain(image) and cut is image
    if preparation.reencode == "never":
        if image.format not in SUFFIX_OF:
            raise DroppedError(
                "broken_image", f"got {image.format}, which shards do not hold; see dataset.reencode=needed"
            )
        return Record(content, "", {}, original_size=upright.size), digest
    if preparation.reencode == "needed" and is_unchanged and image.format in SUFFIX_OF:
        return Record(content, "", columns, original_size=upright.size), digest
    cut.info.clear()  # profile, EXIF data and comments told of the picture as it was
    return Record(cut, "", columns, original_size=upright.size), digest


def _decoded(content: bytes) -> tuple[Image.Image, Image.Image]:
    """Return a picture as it is, and upright in sRGB; raises DroppedError where it cannot be decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged EXIF data and the like: thousands in a set from the web
            image = open_picture(content)
            return image, image if is_plain(image) else to_srgb(image)
    except (TooManyPixelsError, Image.DecompressionBombError) as error:
        raise DroppedError("image_bomb", str(error)) from error
    except UnidentifiedImageError as error:
        raise DroppedError("broken_image", "got a picture that cannot be read; remove or repair it") from error
    except Exception as error:  # the data's edge: Pillow raises SyntaxError, struct.error and more for broken files
        detail = f"got a picture that cannot be read ({error}); remove or repair it"
        raise DroppedError("broken_image", detail) from error


def _hash(content: bytes, upright: Image.Image, preparation: Preparation) -> bytes:
    if preparation.duplicates == "sha256":
        return hashlib.sha256(content).digest()
    if preparation.duplicates == "perceptual":
        return difference_hash(upright).to_bytes(8, "big")
    return b""


def _resized(image: Image.Image, preparation: Preparation) -> Image.Image:
    """Scale the short side to the resolution; a smaller picture grows only where that is asked for."""
    short, resolution = min(image.size), preparation.resolution
    if resolution is None or short == resolution or (short < resolution and not preparation.enlarge):
        return image
    width, height = (max(resolution, round(side * resolution / short)) for side in image.size)
    if preparation.resize_filter == "area" and short > resolution:
        return reduce_area(image, (width, height))
    return image.resize((width, height), FILTERS[preparation.resize_filter])


def _cropped(image: Image.Image, preparation: Preparation) -> tuple[Image.Image, dict[str, Any]]:
    """Cut out the centre square, and say where it lay as SDXL is told of it."""
    if preparation.crop == "none":
        return image, {}
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    columns = {"crop_top": top, "crop_left": left, "target_height": side, "target_width": side}
    if image.size == (side, side):
        return image, columns
    return image.crop((left, top, left + side, top + side)), columns
