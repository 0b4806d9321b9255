"""Evaluation folders as `ldm evaluate` leaves them, with pictures that are drawn."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PROTOCOL: dict[str, Any] = {
    "num_samples": 12,
    "seed": 0,
    "checkpoint": {"path": "runs/toy/1/weights.safetensors", "sha256": "ab", "step": 100},
    "sampler": {"name": "DDIM", "eta": 0.0},
    "steps": 20,
    "guidance": {"scale": 1.5, "rescale": 0.0, "interval": None},
    "image_size": 32,
    "ema": 0.999,
    "reference": {"path": "gone", "sha256": "cd", "count": 40, "preprocessing": {"resolution": 32}},
    "images": None,
    "versions": {"ldm": "0"},
}
KEY = "InceptionFeatures-abc"


def drawn(seed: int, size: int = 32) -> Image.Image:
    """A disc of its own place and colour."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    inside = (x - random.uniform(0.3, 0.7)) ** 2 + (y - random.uniform(0.3, 0.7)) ** 2 < 0.06
    colours = random.integers(0, 256, (2, 3))
    return Image.fromarray(np.where(inside[..., None], colours[0], colours[1]).astype(np.uint8))


def write_evaluation(
    folder: Path,
    *,
    first_picture: int = 0,
    num: int = 12,
    seed: int = 0,
    fid: float = 12.5,
    clip: float | None = 27.0,
    prompts: tuple[str, ...] = ("a red disc", "a <b>blue</b> disc & more", "a disc"),
    protocol: dict[str, Any] | None = None,
    resize: str = "bilinear",
) -> Path:
    """Writes a finished evaluation; protocol: settings that differ from PROTOCOL, nested ones replaced."""
    samples = folder / "samples"
    samples.mkdir(parents=True)
    half = num // 2
    for shard, rows in enumerate((range(half), range(half, num))):
        with tarfile.open(samples / f"{shard:05d}.tar", "w") as tar:
            for index in rows:
                row = {"index": index, "seed": seed + index, "prompt": prompts[index % len(prompts)], "labels": {}}
                _add(tar, f"{index:08d}.png", _png(drawn(first_picture + index)))
                _add(tar, f"{index:08d}.json", json.dumps(row).encode())
        (samples / f"{shard:05d}.done").write_text(json.dumps({"num_samples": len(rows)}))
    metrics: dict[str, Any] = {
        "fid": {"value": fid, "values": {"fid": fid}, "higher_is_better": False, "protocol": {"resize": resize}}
    }
    figures: dict[str, Any] = {"fid": fid, "kid/kid": 0.01, "num_images": num}
    if clip is not None:
        metrics["clip_score"] = {"value": clip, "values": {}, "higher_is_better": True, "protocol": {"clip": "L"}}
        figures["clip_score"] = clip
        lines = [json.dumps({"index": i, "clip_score": 20 + (i * 7) % num}) for i in range(num)]
        (folder / "scores.jsonl").write_text("\n".join(lines) + "\n")
    content = {**figures, "metrics": metrics, "protocol": {**PROTOCOL, "num_samples": num, **(protocol or {})}}
    (folder / "evaluation.json").write_text(json.dumps(content))
    return folder


def write_reference(folder: Path, *, num: int = 40, first_picture: int = 1000) -> Path:
    """Writes real pictures as files."""
    folder.mkdir(parents=True)
    for number in range(num):
        drawn(first_picture + number).save(folder / f"{number:04d}.png")
    return folder


def write_features(folder: Path, features: np.ndarray, *, describe: bool = True) -> None:
    """Writes features (N, D) as an evaluation, or a cache of the reference, keeps them."""
    place = folder / "features" / KEY
    place.mkdir(parents=True)
    half = len(features) // 2
    for shard, part in enumerate((features[:half], features[half:])):
        np.save(place / f"{shard:05d}.npy", part.astype(np.float32))
    if describe:
        (place / "network.json").write_text(json.dumps({"network": "ldm.metrics.InceptionFeatures", "sha256": "ef"}))


def _png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return stream.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
