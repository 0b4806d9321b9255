"""Pictures in every form in which `ldm shard` reads them, and shards as comparable bytes."""

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from PIL import Image
from pyarrow import parquet

# The columns that img2dataset 1.47 writes after those it was asked to save.
FETCHED = ("key", "status", "error_message", "width", "height", "original_width", "original_height", "exif", "sha256")


def picture(seed: int, size: tuple[int, int] = (24, 16), mode: str = "RGB") -> Image.Image:
    """Smooth enough that its hash is its own, and JPEG leaves it much as it is."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, image_format: str = "JPEG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=image_format, **options)
    return stream.getvalue()


def write_pictures(folder: Path, count: int, *, captions: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i:03d}.jpg").write_bytes(encoded(picture(i)))
        if captions:
            (folder / f"{i:03d}.txt").write_text(f"caption {i}")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def samples(folder: Path) -> list[dict[str, Any]]:
    """Return each sample's json with its picture, bytes and text as "image", "bytes" and "txt"."""
    return [sample for path in sorted(folder.glob("*.tar")) for sample in _samples(path)]


def _samples(path: Path) -> Iterator[dict[str, Any]]:
    with tarfile.open(path) as tar:
        members = {entry.name: tar.extractfile(entry).read() for entry in tar}
    for name in members:
        if name.endswith(".json"):
            row = json.loads(members[name])
            image = next(
                members[f"{row['key']}.{end}"] for end in ("jpg", "png", "webp") if f"{row['key']}.{end}" in members
            )
            yield {
                **row,
                "image": Image.open(io.BytesIO(image)),
                "bytes": image,
                "txt": members[f"{row['key']}.txt"].decode(),
            }


def dropped(folder: Path) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]
    return [(row["source"], row["reason"]) for row in rows]


def fetch(folder: Path, rows: Sequence[dict[str, Any]], *, output_format: str, shard: int = 0) -> None:
    """Write a shard as img2dataset does; a row without "jpg" could not be fetched. `_stats.json` comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    number, lines = f"{shard:05d}", []
    tar = tarfile.open(folder / f"{number}.tar", "w") if output_format == "webdataset" else None  # noqa: SIM115
    for i, row in enumerate(rows):
        line = fetched_row(row, key=f"{number}{i:04d}")
        lines.append(line if output_format != "parquet" else {**line, "jpg": row.get("jpg")})
        if "jpg" not in row or output_format == "parquet":
            continue
        members = {"jpg": row["jpg"], "json": json.dumps(line, indent=4).encode()}
        if "caption" in row:
            members["txt"] = (row["caption"] or "").encode()
        for suffix, content in members.items():
            if tar is not None:
                entry = tarfile.TarInfo(f"{line['key']}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
            else:
                (folder / number).mkdir(exist_ok=True)
                (folder / number / f"{line['key']}.{suffix}").write_bytes(content)
    if tar is not None:
        tar.close()
    parquet.write_table(pyarrow.Table.from_pylist(lines), folder / f"{number}.parquet")
    fetched = sum("jpg" in row for row in rows)
    (folder / f"{number}_stats.json").write_text(json.dumps({"count": len(rows), "successes": fetched}))


def fetched_row(row: dict[str, Any], *, key: str) -> dict[str, Any]:
    given = {name: value for name, value in row.items() if name not in ("jpg", "error")}
    status = "success" if "jpg" in row else "failed_to_download"
    known = {"key": key, "status": status, "error_message": row.get("error"), "sha256": "00" if "jpg" in row else None}
    sizes = {"width": 24, "height": 16, "original_width": 240, "original_height": 160} if "jpg" in row else {}
    return {**given, **dict.fromkeys(FETCHED), **known, **sizes}
