"""Reads other projects' weight files without running anything that they contain, and says what is wrong with bad ones.

The kind of a file is told by its first bytes, not by its name. Tensors stay mapped from disk where the format allows
it, so that a file of 4 GB is held in memory once, and only as far as it is used.
"""

from __future__ import annotations

import json
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# Libraries whose classes training scripts leave in checkpoints. What they name is read as an empty record of ours.
RECORD_KEEPERS = ("pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities", "omegaconf", "typing")
# Plain containers and numbers that are not on torch's own list.
PLAIN = ("builtins.dict", "builtins.list", "builtins.int", "builtins.float", "builtins.str", "builtins.bool")
NUMPY = ("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
# Of a component's file, the best first.
ENDINGS = (
    *(".safetensors", ".safetensors.index.json", ".fp16.safetensors", ".safetensors.index.fp16.json"),
    *(".bin", ".bin.index.json", ".fp16.bin", ".bin.index.fp16.json"),
)
# More than this safetensors refuses.
MAX_HEADER_BYTES = 100_000_000
# How a page begins that a site sent in place of the file.
_PAGE = (b"<!doctype", b"<html", b"<?xml")


@dataclass(frozen=True)
class WeightsFile:
    """The tensors of a file by name, and the text that it says about itself."""

    state: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)


def read_file(path: Path | str) -> WeightsFile:
    """Reads a .safetensors file, a sharded one (*.index.json), or a pickle (.ckpt, .pt, .bin) of tensors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, cut short, not a weights file at all, or a pickle that needs more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"got {path}, where there is no file; expected .safetensors, .ckpt, .pt or .bin")
    if path.suffix == ".json" and ".index." in path.name:
        return read_shards(path)
    with path.open("rb") as file:
        head = file.read(512)
    kind = _kind(path, head)
    return _read_safetensors(path) if kind == "safetensors" else WeightsFile(_read_pickle(path, zipped=kind == "zip"))


def read_shards(index: Path) -> WeightsFile:
    """Reads every file that an `*.index.json` names, and checks that each tensor is where the index says.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: the index is damaged, or a shard lacks a tensor.
    """
    try:
        places = dict(json.loads(index.read_text())["weight_map"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"got {index}, expected the index of a sharded file with a weight_map; copy it again"
        ) from error
    if any(Path(name).name != name for name in places.values()):
        raise ValueError(f"got {index}, which names files outside its folder, expected names of files beside it")
    shards = {name: read_file(index.with_name(name)).state for name in sorted(set(places.values()))}
    absent = [key for key, name in places.items() if key not in shards[name]]
    if absent:
        raise ValueError(f"got {index}, whose shards lack {named(absent)}, expected them all; copy the folder again")
    return WeightsFile({key: shards[name][key] for key, name in places.items()})


def find_weights(folder: Path, stem: str) -> Path:
    """The file of a component's folder: safetensors before pickles, whole before sharded, full before half precision.

    Raises:
        FileNotFoundError: there is none.
    """
    for ending in ENDINGS:
        if (folder / f"{stem}{ending}").is_file():
            return folder / f"{stem}{ending}"
    raise FileNotFoundError(f"got {folder} without {stem}.safetensors (or .bin); copy the whole folder again")


def named(names: list[str], *, most: int = 3) -> str:
    """The first few names and how many there are: "a, b, c and 7 more"."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _kind(path: Path, head: bytes) -> str:
    """safetensors, zip or pickle, by the first bytes."""
    start = head.lstrip().lower()
    if not head:
        raise ValueError(f"got {path}, an empty file, expected weights; download it again")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"got {path}, a git-lfs pointer in place of the weights; run `git lfs pull` where it came from"
        )
    if start.startswith(_PAGE):
        raise ValueError(
            f"got {path}, a web page in place of the weights; download the file itself, logged in if needed"
        )
    # First: the length that they begin with may be any bytes, those of a zip or a pickle too.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER_BYTES:
        return "safetensors"
    if head.startswith(b"PK"):
        return "zip"
    if head.startswith(b"\x80"):
        return "pickle"
    raise ValueError(f"got {path}, which is neither safetensors nor a torch pickle; expected one of them")


def _read_safetensors(path: Path) -> WeightsFile:
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return WeightsFile(state, dict(file.metadata() or {}))
    except SafetensorError as error:
        raise ValueError(
            f"got {path} of {path.stat().st_size} bytes, which is cut short or damaged ({error}); download it again"
        ) from error


def _read_pickle(path: Path, *, zipped: bool) -> dict[str, Tensor]:
    try:
        stand_ins = _stand_ins(path) if zipped else []
        with torch.serialization.safe_globals(stand_ins):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise ValueError(_refusal(path, str(error))) from error
    except (RuntimeError, EOFError, OSError, KeyError, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(f"got {path}, which is cut short or damaged ({reason}); download it again") from error
    return _tensors(path, content)


def _tensors(path: Path, content: Any) -> dict[str, Tensor]:
    state = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"got {path}, a pickle without named tensors, expected a state dict; name another file")
    return tensors


def _stand_ins(path: Path) -> list[Any]:
    """Inert classes of ours for the harmless names of a checkpoint that torch does not know.

    The file's own classes are never imported and nothing of theirs is called: a stand-in only holds what it is given.

    Raises:
        pickle.UnpicklingError: the file names anything else.
    """
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    foreign = sorted(name for name in names if not _is_harmless(name))
    if foreign:
        raise pickle.UnpicklingError(f"GLOBAL {foreign[0]} ")
    return [(type("StandIn", (_Bytes if name in NUMPY else _Record,), {}), name) for name in names]


def _is_harmless(name: str) -> bool:
    return name in (*PLAIN, *NUMPY, "collections.defaultdict") or name.partition(".")[0] in RECORD_KEEPERS


class _Record:
    """Takes the place of any class of a record-keeping library; its instances are plain ordered dicts."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return OrderedDict()


class _Bytes:
    """Takes the place of NumPy's scalars and their dtypes, and forgets their value."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _refusal(path: Path, reason: str) -> str:
    """One line for a pickle that asks for more than tensors."""
    _, found, rest = reason.partition("GLOBAL ")
    culprit = f"asks for {rest.split()[0]}" if found else f"holds more than tensors ({reason.partition(chr(10))[0]})"
    return (
        f"got {path}, a pickle that {culprit}, which could run code; expected tensors alone; "
        "get the .safetensors file, or convert it where its author is trusted"
    )
