"""What of a checkpoint goes into which file: weights and their average as safetensors, the rest loadable as plain data.

weights.safetensors    the trained module's tensors, by their names in its state dict
ema.safetensors        those of the moving average
config.json            the run's config
state.pt               optimizers, loops and everything else; loads with `weights_only=True`
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import pickle
import re
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any, BinaryIO

import torch
from safetensors.torch import load, load_file
from torch import Tensor

from ldm.training.checkpoint_files import Damaged, Place, Writer, local_path, read_manifest, url_to_fs, verify
from ldm.training.checkpoint_folders import child

STATE, WEIGHTS, AVERAGE, CONFIG = "state.pt", "weights.safetensors", "ema.safetensors", "config.json"
EMA_PREFIX = "ema."
# What safetensors calls the kinds of numbers.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def parts_of(checkpoint: Mapping[str, Any]) -> dict[str, Writer]:
    """The files of a checkpoint, as functions that write them; tensors leave their device one by one.

    Raises:
        ValueError: something in it could be loaded by running its code only.
    """
    rest = dict(checkpoint)
    parts: dict[str, Writer] = {}
    if "state_dict" in rest:
        named = dict(rest["state_dict"])
        plain = {name: value for name, value in named.items() if _fits_safetensors(value)}
        average = {name: value for name, value in plain.items() if name.startswith(EMA_PREFIX)}
        weights = {name: value for name, value in plain.items() if name not in average}
        parts |= {file: _tensors_writer(kept) for file, kept in {WEIGHTS: weights, AVERAGE: average}.items() if kept}
        other = {name: value for name, value in named.items() if name not in plain}
        rest["state_dict"] = {"names": list(named), "other": other}
    if "config" in rest and _is_plain(rest["config"]):
        text = json.dumps(rest.pop("config"), indent=2).encode()
        parts[CONFIG] = lambda file: _write(file, text)
    refuse_code(rest)
    parts[STATE] = lambda file: torch.save(rest, file)
    return parts


def facts_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest says about a checkpoint: step, epoch, processes, versions, config and data."""
    fingerprints = [value["fingerprint"] for value in checkpoint.values() if _has_fingerprint(value)]
    facts = {
        "step": checkpoint.get("global_step"),
        "epoch": checkpoint.get("epoch"),
        "world_size": torch.distributed.get_world_size() if _distributed() else 1,
        "config_sha256": _digest(checkpoint["config"]) if "config" in checkpoint else None,
        "data": fingerprints[0] if fingerprints else None,
        "versions": {"ldm": version("ldm"), "torch": torch.__version__, "lightning": version("pytorch-lightning")},
    }
    return {name: value for name, value in facts.items() if value is not None}


def read(place: Place, *, map_location: Any = "cpu") -> dict[str, Any]:
    """A whole checkpoint, of this or of the former format; runs no code of it. Checksums are `verify`'s.

    Raises:
        FileNotFoundError: there is nothing.
        Damaged: there is a folder without a valid manifest.
    """
    fs, root = url_to_fs(str(place))
    if not fs.exists(root):
        raise FileNotFoundError(f"got no checkpoint at {place}; check the path")
    if fs.isfile(root):
        return _load(place, map_location)
    manifest = read_manifest(place)
    if STATE not in manifest.files:
        raise Damaged(f"{place} has no {STATE}: it was saved in shards, which only the same strategy reads")
    checkpoint = _load(child(place, manifest.files[STATE]["file"]), map_location)
    if "state_dict" in checkpoint:
        found = {**checkpoint["state_dict"]["other"], **read_weights_of(place, map_location=map_location)}
        checkpoint["state_dict"] = {name: found[name] for name in checkpoint["state_dict"]["names"]}
    if CONFIG in manifest.files:
        checkpoint["config"] = _read_config(place)
    return checkpoint


def read_model(place: Place) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, state dict) of a checkpoint, without reading the optimizers' state, after checking every byte.

    Raises:
        ValueError: it is damaged, or holds no config.
    """
    try:
        verify(place)
    except Damaged as damage:
        raise Damaged(f"got {place}, a damaged checkpoint ({damage}); take another one") from damage
    folder = not url_to_fs(str(place))[0].isfile(str(place))
    if folder and {CONFIG, WEIGHTS} <= read_manifest(place).files.keys():
        return _read_config(place), read_weights_of(place)
    checkpoint = read(place)
    if "config" not in checkpoint:
        raise ValueError(f"got {place}, a checkpoint without a config, expected one that `ldm train` wrote")
    return checkpoint["config"], checkpoint["state_dict"]


def read_weights_of(place: Place, *, map_location: Any = "cpu") -> dict[str, Tensor]:
    """The tensors of a checkpoint folder's weights and of their moving average, without the optimizers'."""
    fs, root = url_to_fs(str(place))
    tensors: dict[str, Tensor] = {}
    for part in (WEIGHTS, AVERAGE):
        record = read_manifest(place).files.get(part)
        if record is None:
            continue
        name = f"{root}/{record['file']}"
        tensors |= load_file(name) if local_path(place) is not None else load(fs.cat_file(name))
    if isinstance(map_location, str | torch.device):
        return {name: tensor.to(map_location) for name, tensor in tensors.items()}
    return tensors


def num_bytes(checkpoint: Any) -> int:
    """The size of all tensors in a checkpoint."""
    sizes: list[int] = []
    map_tensors(checkpoint, lambda tensor: sizes.append(tensor.nbytes))
    return sum(sizes)


def snapshot(checkpoint: Any) -> Any:
    """A copy on the CPU that later training steps do not change."""
    return map_tensors(checkpoint, lambda tensor: tensor.detach().to("cpu", copy=True))


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same nested dicts, lists and tuples with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        # Copied first: subclasses keep their kind.
        copied = copy.copy(value)
        copied.update((key, map_tensors(item, change)) for key, item in value.items())
        return copied
    if isinstance(value, list):
        return [map_tensors(item, change) for item in value]
    if isinstance(value, tuple):
        items = [map_tensors(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _tensors_writer(tensors: Mapping[str, Tensor]) -> Writer:
    """Writes safetensors: the length of a JSON header, the header, then the numbers; the widest come first."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))

    def write(file: BinaryIO) -> None:
        header, start = {}, 0
        for name, tensor in ordered:
            offsets = [start, start := start + tensor.nbytes]
            header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for _, tensor in ordered:
            if tensor.nbytes:
                flat = tensor.detach().cpu().contiguous().reshape(-1)
                file.write(flat.view(torch.uint8).numpy().data)

    return write


def _fits_safetensors(value: Any) -> bool:
    return type(value) in (Tensor, torch.nn.Parameter) and value.layout is torch.strided and value.dtype in _DTYPES


def refuse_code(rest: Mapping[str, Any]) -> None:
    """Refuses now what could not be resumed from later."""
    probe, nothing = io.BytesIO(), torch.empty(0)
    torch.save(map_tensors(rest, lambda tensor: nothing), probe)
    probe.seek(0)
    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(probe)
    if unsafe:
        raise ValueError(
            f"checkpoint: got an object of {', '.join(sorted(unsafe))}, expected tensors and plain Python values, "
            "which load without running code; convert it in on_save_checkpoint or state_dict"
        )


def _is_plain(value: Any) -> bool:
    """Whether JSON gives the same value back."""
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError):
        return False


def _digest(config: Any) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()


def _has_fingerprint(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("fingerprint"), str)


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _read_config(place: Place) -> dict[str, Any]:
    fs, root = url_to_fs(str(place))
    return json.loads(fs.cat_file(f"{root}/{read_manifest(place).files[CONFIG]['file']}"))


def _load(place: Place, map_location: Any) -> dict[str, Any]:
    fs, root = url_to_fs(str(place))
    try:
        with fs.open(root, "rb") as file:
            return torch.load(file, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        what = f"a pickle that asks for {asked[1]}" if asked else "a file that is no pickle of tensors"
        raise ValueError(
            f"checkpoint: got {place}, {what}, expected tensors and plain values; nothing of it was run; resume from a "
            "checkpoint that `ldm train` wrote"
        ) from None


def _write(file: BinaryIO, data: bytes) -> None:
    file.write(data)
