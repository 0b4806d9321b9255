"""Whether a checkpoint fits a model: seen from names and sizes alone, in a moment, before any data is opened."""

from __future__ import annotations

import json

from torch import nn

from ldm.training.checkpoint_files import Place, read_manifest, url_to_fs
from ldm.training.checkpoint_parts import AVERAGE, WEIGHTS, read
from ldm.training.frozen import drop_frozen

# Of the names in the message.
_SHOWN = 5


def refuse_other_model(model: nn.Module, place: Place) -> None:
    """Refuses a checkpoint of another architecture.

    Raises:
        ValueError: names or sizes of its tensors are not the model's; in one line, with the first of them.
    """
    there = shapes_of(place)
    if not there:
        return
    here = {name: tuple(value.shape) for name, value in drop_frozen(model, model.state_dict()).items()}
    resized = [name for name in here if name in there and there[name] != here[name]]
    missing, unknown = [name for name in here if name not in there], [name for name in there if name not in here]
    if not (resized or missing or unknown):
        return
    counts = {"of another size": resized, "missing": missing, "of no use here": unknown}
    words = [f"{len(names)} {what}" for what, names in counts.items() if names]
    told = [f"{name} {there[name]} there, {here[name]} here" for name in resized]
    told += [f"{name} missing there" for name in missing] + [f"{name} unknown here" for name in unknown]
    raise ValueError(
        f"resume: got {place}, a checkpoint of another model: of {len(here)} tensors {', '.join(words)} "
        f"({'; '.join(told[:_SHOWN])}{'; ...' if len(told) > _SHOWN else ''}); expected one of this model: give the "
        "settings that it was trained with, or another run_id"
    )


def shapes_of(place: Place) -> dict[str, tuple[int, ...]]:
    """Names and sizes of a checkpoint's weights, read from headers; empty where it was saved in shards."""
    fs, root = url_to_fs(str(place))
    if fs.isfile(root):
        return {name: tuple(value.shape) for name, value in read(place).get("state_dict", {}).items()}
    shapes: dict[str, tuple[int, ...]] = {}
    for part, record in read_manifest(place).files.items():
        if part in (WEIGHTS, AVERAGE):
            with fs.open(f"{root}/{record['file']}", "rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            shapes |= {name: tuple(told["shape"]) for name, told in header.items() if name != "__metadata__"}
    return shapes
