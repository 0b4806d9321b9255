"""The files of an evaluation's folder: its plan, its figures, its grid, and what is removed from it."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.files import REMAINS, replacing, write_text
from ldm.generation.evaluation.images import Images
from ldm.generation.postprocess import grid

SHOWN = 100
PLAN, RESULT = "plan.json", "evaluation.json"
# What takes room: samples, and what was computed of them.
BULK = ("samples", "features", "sums")


def keep_plan(folder: Path, plan: Mapping[str, Any]) -> None:
    """Writes folder/plan.json: what the samples in the folder are.

    Raises:
        ValueError: the folder holds samples of another plan; the first difference is named.
    """
    different = difference(folder, plan)
    if different is not None:
        name, there, wanted = different
        raise ValueError(
            f"got {folder}, which holds an evaluation with {name}={there}, expected {wanted}; give another folder: "
            "out=..."
        )
    if not (folder / PLAN).is_file():
        write_text(folder / PLAN, json.dumps(plan, indent=1) + "\n")


def holds_another(folder: Path, plan: Mapping[str, Any]) -> bool:
    """Whether the folder holds samples of another plan."""
    return difference(folder, plan) is not None


def difference(folder: Path, plan: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """(name, value there, value wanted) of the first thing in which a folder's plan differs, or None."""
    path = folder / PLAN
    if not path.is_file():
        return None
    there, wanted = placeless(json.loads(path.read_text())), placeless(json.loads(json.dumps(plan)))
    name = next((key for key in {**there, **wanted} if there.get(key) != wanted.get(key)), None)
    return None if name is None else (name, there.get(name), wanted.get(name))


def merged(path: Path, report: dict[str, Any]) -> dict[str, Any]:
    """A report with the metrics that an earlier one of the same samples had besides."""
    if not path.is_file():
        return report
    before = json.loads(path.read_text())
    kept = {name: value for name, value in before.get("metrics", {}).items() if name not in report["metrics"]}
    flat = {name: value for name, value in before.items() if name.partition("/")[0] in kept}
    return {**flat, **report, "metrics": {**kept, **report["metrics"]}}


def show(images: Images, path: Path) -> None:
    """A grid of the first images; those of another size are scaled to the first one's."""
    pictures = [Image.fromarray(images[i]["image"].permute(1, 2, 0).numpy()) for i in range(min(SHOWN, len(images)))]
    size = pictures[0].size
    sheet = grid([picture if picture.size == size else picture.resize(size) for picture in pictures])
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG")


def clear(folder: Path) -> None:
    """Removes samples, features and sums, and leaves the figures."""
    for name in BULK:
        shutil.rmtree(folder / name, ignore_errors=True)


def remove_remains(folder: Path) -> None:
    """Removes what killed processes had begun to write: when all tasks are done, nobody else writes."""
    for place in (folder / name for name in BULK):
        for part in place.rglob(REMAINS):
            part.unlink(missing_ok=True)


def is_clear(folder: Path) -> bool:
    """Whether they are removed."""
    return not any((folder / name).exists() for name in BULK)


def finite(value: float) -> float | None:
    """The value, or None where it is none: strict JSON knows no NaN."""
    return value if math.isfinite(value) else None


def answers(path: Path, request: str) -> bool:
    """Whether a file of figures is the result of this very request."""
    return path.is_file() and json.loads(path.read_text()).get("request") == request


def placeless(value: Any) -> Any:
    """A plan without the places of files, which their hashes stand for: a run that was moved is the same run."""
    if isinstance(value, Mapping):
        return {key: placeless(item) for key, item in value.items() if key != "path"}
    return [placeless(item) for item in value] if isinstance(value, list) else value


def digest(value: Any) -> str:
    """Sixteen hexadecimal digits of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(placeless(value), sort_keys=True, default=str).encode()).hexdigest()[:16]
