"""A folder of pictures as a data set: captions beside them or one for all, and pictures of the class as a prior."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from ldm.data.transforms import crop_box, resize_and_crop
from ldm.data.writer import Record, write_shards

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

Captions = str | Sequence[str] | None


@dataclass(frozen=True)
class Picture:
    """A file with one of its captions; `is_prior` marks pictures that stand for what the model knew before."""

    path: Path
    caption: str
    is_prior: bool = False


def write_folder(
    folder: str | os.PathLike[str],
    *,
    images: str | os.PathLike[str],
    caption: Captions = None,
    class_images: str | os.PathLike[str] | None = None,
    class_caption: Captions = None,
    resolution: int = 512,
    samples_per_shard: int = 1000,
    image_format: str = "png",
) -> dict[str, Any]:
    """Write the pictures of a folder, and of a folder of class pictures, as shards into folder/train.

    Each json has the column `is_prior`, 1 for class pictures. With class pictures, those of which there are fewer are
    written again and again until there are as many of both (DreamBooth, Ruiz et al. 2023, section 3.3).

    Args:
        caption: of every picture, or several, each of which makes a sample of every picture; None reads NAME.txt
            beside NAME.jpg.
        class_images, class_caption: the same of the class pictures.
        resolution: pixels; the short side is scaled to it and the centre cut out.

    Returns the number of samples by kind. Raises ValueError where pictures or captions are missing or unreadable.
    """
    if resolution < 1:
        raise ValueError(f"resolution: got {resolution}, expected pixels, as in 512")
    pictures = find_pictures(images, caption, option="images")
    num_priors = 0
    if class_images is not None:
        priors = find_pictures(class_images, class_caption, option="class_images", is_prior=True)
        pictures = list(chain.from_iterable(paired(pictures, priors)))
        num_priors = len(pictures) // 2
    records = (read_picture(picture, resolution) for picture in pictures)
    write_shards(Path(folder) / "train", records, samples_per_shard=samples_per_shard, image_format=image_format)
    return {"train": len(pictures), "priors": num_priors}


def find_pictures(
    folder: str | os.PathLike[str], caption: Captions, *, option: str, is_prior: bool = False
) -> list[Picture]:
    """Return the pictures of a folder by name, each as often as it has captions; `option` names it in errors."""
    paths = sorted(path for path in Path(folder).glob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(
            f"{option}: got {folder}, expected a folder with pictures ({', '.join(SUFFIXES)}); give {option}=FOLDER"
        )
    fixed = [caption] if isinstance(caption, str) else caption
    return [
        Picture(path, words, is_prior) for path in paths for words in (fixed or [_caption_beside(path, option=option)])
    ]


def paired(instances: Sequence[Picture], priors: Sequence[Picture]) -> Iterator[tuple[Picture, Picture]]:
    """Yield pairs of both; the shorter starts anew until the longer ends."""
    for i in range(max(len(instances), len(priors))):
        yield instances[i % len(instances)], priors[i % len(priors)]


def read_picture(picture: Picture, resolution: int) -> Record:
    """Return a picture upright, in RGB and square, with the size that it had."""
    try:
        with Image.open(picture.path) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{picture.path}: got a picture that cannot be read ({error}); remove or repair it") from error
    _, _, left, top = crop_box(image.size, resolution)
    sizes = {"crop_top": top, "crop_left": left, "target_height": resolution, "target_width": resolution}
    return Record(
        image=resize_and_crop(image, resolution),
        caption=picture.caption,
        columns={"is_prior": int(picture.is_prior), **sizes},
        original_size=image.size,
    )


def _caption_beside(path: Path, *, option: str) -> str:
    text = path.with_suffix(".txt")
    if not text.is_file():
        setting = option.replace("images", "caption")
        raise ValueError(f"{option}: got {path} without {text.name} beside it, expected a caption; give {setting}=TEXT")
    return text.read_text(encoding="utf-8").strip()
