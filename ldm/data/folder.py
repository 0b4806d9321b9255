"""A folder of pictures as a data set: captions beside them or one for all, and pictures of the class as a prior."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from ldm.data.making.make import make_shards
from ldm.data.making.sources import Extent, Item

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")

Captions = str | Sequence[str] | None


@dataclass(frozen=True)
class Folder:
    """The pictures of a folder by name, and pictures of what their subject is one of.

    A picture's caption is NAME.txt beside it, else the `caption` (or `text`) of NAME.json, whose other entries become
    columns. Every sample has the column `is_prior`, 1 for class pictures. With class pictures, those of which there
    are fewer come again and again until there are as many of both (DreamBooth, Ruiz et al. 2023, section 3.3).

    Args:
        images: the folder.
        caption: of every picture, or several, each of which makes a sample of every picture; None reads it beside.
        class_images, class_caption: the same of the class pictures.
        pattern: which files, as a glob: "**/*" also reads the folders inside.
        columns: the entries of NAME.json to keep, under these names; None = all.
    """

    images: str | os.PathLike[str]
    caption: Captions = None
    class_images: str | os.PathLike[str] | None = None
    class_caption: Captions = None
    pattern: str = "*"
    columns: Sequence[str] | None = None

    def files(self) -> list[str]:
        """Return the pictures and what lies beside them; raises ValueError where there is no picture."""
        items = [*self._instances, *self._priors]
        parts = [part for item in items for part in (item.image, item.caption, item.columns)]
        return sorted({part.path for part in parts if isinstance(part, Extent)})

    def parts(self) -> list[str]:
        """Return the folder as its only part."""
        return [str(self.images)]

    def items(self, part: str) -> Iterator[Item]:
        """Yield the pictures, in pairs with those of the class; raises ValueError where there is no picture."""
        instances, priors = self._instances, self._priors
        yield from chain.from_iterable(paired(instances, priors)) if priors else instances

    @cached_property
    def _instances(self) -> list[Item]:
        return self._found(self.images, self.caption, option="images", is_prior=False)

    @cached_property
    def _priors(self) -> list[Item]:
        if self.class_images is None:
            return []
        return self._found(self.class_images, self.class_caption, option="class_images", is_prior=True)

    def _found(self, folder: str | os.PathLike[str], caption: Captions, *, option: str, is_prior: bool) -> list[Item]:
        """Return the pictures of a folder, each as often as it has captions; `option` names it in errors."""
        paths = sorted(path for path in Path(folder).glob(self.pattern) if path.suffix.lower() in SUFFIXES)
        if not paths:
            inside = any(path.suffix.lower() in SUFFIXES for path in Path(folder).rglob("*"))
            remedy = "dataset.pattern='**/*' reads the folders inside" if inside else f"give dataset.{option}=FOLDER"
            raise ValueError(
                f"{option}: got {folder}, expected a folder with pictures ({', '.join(SUFFIXES)}); {remedy}"
            )
        fixed: Sequence[str | None] = [caption] if isinstance(caption, str) else caption or [None]
        beside = cache(lambda parent: frozenset(path.name for path in parent.iterdir()))
        setting = option.replace("images", "caption")
        return [
            Item(
                name=path.relative_to(folder).as_posix(),
                image=Extent(str(path)),
                caption=words if caption else _beside(path, ".txt", beside(path.parent)),
                columns=_beside(path, ".json", beside(path.parent)) or {},
                keep=None if self.columns is None else tuple(self.columns),
                own={"is_prior": int(is_prior)},
                without_caption=(
                    f"got {path} without {path.stem}.txt beside it, expected a caption; give dataset.{setting}=TEXT"
                ),
            )
            for path in paths
            for words in fixed
        ]


def _beside(path: Path, suffix: str, names: frozenset[str]) -> Extent | None:
    return Extent(str(path.with_suffix(suffix))) if path.stem + suffix in names else None


def paired(instances: Sequence[Item], priors: Sequence[Item]) -> Iterator[tuple[Item, Item]]:
    """Yield pairs of both; the shorter starts anew until the longer ends."""
    for i in range(max(len(instances), len(priors))):
        yield instances[i % len(instances)], priors[i % len(priors)]


def write_folder(
    folder: str | os.PathLike[str],
    *,
    images: str | os.PathLike[str],
    caption: Captions = None,
    class_images: str | os.PathLike[str] | None = None,
    class_caption: Captions = None,
    pattern: str = "*",
    columns: Sequence[str] | None = None,
    resolution: int | None = 512,
    resize_filter: str = "area",
    enlarge: bool = True,
    crop: str = "centre",
    reencode: str = "always",
    image_format: str = "png",
    quality: int = 95,
    min_size: int = 0,
    captions: str = "required",
    duplicates: str = "keep",
    duplicate_distance: int = 0,
    faults: str = "refuse",
    samples_per_shard: int = 1000,
    workers: int = 0,
    progress: Callable[[int, int], None] = lambda written, dropped: None,
) -> dict[str, Any]:
    """Write the pictures of a folder, and of a folder of class pictures, as shards into folder/train.

    `images` to `columns` are those of `Folder`; the others are those of `make_shards`, each stated again because a
    signature is what settings are checked against. The defaults are here those of a few pictures to fine-tune with:
    squares, and an error for a picture that cannot be written.

    Raises ValueError as they do, and where duplicates are to be dropped of pictures that are repeated on purpose.
    """
    repeated = class_images is not None or not isinstance(caption, str | None)
    if repeated and duplicates != "keep":
        raise ValueError(
            f"duplicates: got {duplicates} with class_images or several captions, which repeat pictures, expected keep"
        )
    return make_shards(
        folder,
        source=Folder(images, caption, class_images, class_caption, pattern, columns),
        resolution=resolution,
        resize_filter=resize_filter,
        enlarge=enlarge,
        crop=crop,
        reencode=reencode,
        image_format=image_format,
        quality=quality,
        min_size=min_size,
        captions=captions,
        duplicates=duplicates,
        duplicate_distance=duplicate_distance,
        faults=faults,
        samples_per_shard=samples_per_shard,
        workers=workers,
        progress=progress,
    )
