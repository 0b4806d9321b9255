"""Prompts to evaluate with: files of captions, the captions of a split, classes, or none."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.conditioners import Conditioner, Unconditional

Prompts = list[dict[str, Any]]
# Columns and keys that hold the prompt, in the order in which they are looked for.
NAMES = ("prompt", "caption", "text", "title")


def read_prompts(path: Path | str) -> Prompts:
    """Prompts with their numeric labels from a file.

    .txt holds one a line; .csv and .tsv have a column prompt, caption or text; .jsonl one such object a line; .json a
    list of texts or of such objects, or `{"annotations": [{"caption": ...}, ...]}` as COCO's captions_val2014.json.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds no prompts, or is of another kind.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"prompts: got {path}, where there is no file; expected .txt, .csv, .tsv, .json, .jsonl"
        )
    try:
        # Of which `io.StringIO` gives the lines: `str.splitlines` would break them at characters that captions hold.
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts: got {path}, which is no UTF-8 text ({error}); save it as UTF-8") from error
    if file.suffix == ".txt":
        rows: Sequence[Any] = [line.strip() for line in io.StringIO(text) if line.strip()]
    elif file.suffix in (".csv", ".tsv"):
        rows = list(csv.DictReader(io.StringIO(text), delimiter="," if file.suffix == ".csv" else "\t"))
    elif file.suffix in (".json", ".jsonl"):
        rows = _json_rows(text, file)
    else:
        raise ValueError(f"prompts: got {path}, expected a file .txt, .csv, .tsv, .json or .jsonl; rename it")
    if not rows:
        raise ValueError(f"prompts: got {path}, which holds none; expected at least one")
    return [_prompt(row, file) for row in rows]


def caption_prompts(data: Any, split: str = "validation") -> Prompts:
    """The captions of a split, in its order, with its numeric columns; pictures are not decoded.

    Args:
        data: a data module, or an object with `iterate_once(split, batch_size)`.
    """
    dataset: Any = data.dataset(split) if hasattr(data, "dataset") else None
    if hasattr(dataset, "annotation"):
        found = []
        for index in range(len(dataset)):
            caption, columns = dataset.annotation(index)
            found.append({"prompt": caption, **columns})
        return found
    return [{"prompt": caption} for batch in data.iterate_once(split, 256) for caption in batch.get("caption", ())]


def class_prompts(num_classes: int) -> Prompts:
    """Every class once, by number, as class-conditional models take them."""
    return [{"prompt": str(label), "class_label": label} for label in range(num_classes)]


def own_prompts(conditioner: Conditioner) -> Prompts | None:
    """What a model that knows no words is asked for: nothing, or each of its classes; None for one that reads text."""
    if isinstance(conditioner, Unconditional):
        return [{"prompt": ""}]
    num_classes = getattr(conditioner, "num_classes", None)
    return class_prompts(num_classes) if isinstance(num_classes, int) else None


def _json_rows(text: str, file: Path) -> Sequence[Any]:
    try:
        if file.suffix == ".jsonl":
            return [json.loads(line) for line in io.StringIO(text) if line.strip()]
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"prompts: got {file}, which is no JSON ({error}); write it again") from error
    rows = found.get("annotations") if isinstance(found, dict) else found
    if not isinstance(rows, list):
        raise ValueError(f"prompts: got {file} without a list, expected one, or COCO's annotations")
    return rows


def _prompt(row: Any, file: Path) -> dict[str, Any]:
    if isinstance(row, str):
        return {"prompt": row}
    name = next((name for name in NAMES if isinstance(row, Mapping) and isinstance(row.get(name), str)), None)
    if name is None:
        has = ", ".join(row) if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(f"prompts: got {file} with {has}, expected one of {', '.join(NAMES)} in every row")
    labels = {key: number for key, value in row.items() if (number := _number(value)) is not None and key not in NAMES}
    return {"prompt": row[name].strip(), **labels}


def _number(value: Any) -> float | int | None:
    """The number that a value is, or that a text of a .csv writes."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    if not isinstance(value, str):
        return None
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return None
