"""Weights files of feature networks: found on disk, read without running code, known by their hash."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn


def find_weights(path: Path | str | None, *, cached: Sequence[Path], what: str, source: str, option: str) -> Path:
    """The file or folder at `path`, or, when None, the first of `cached` that exists; nothing is ever downloaded.

    Args:
        path: what the user gave.
        cached: where the usual caches would hold it.
        what: name of the network, for the message.
        source: where to get the file, for the message.
        option: the argument to give it with, for the message.

    Raises:
        FileNotFoundError: there is none; one line that names file, source and option.
    """
    candidates = list(cached) if path is None else [Path(path)]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    place = f"at {candidates[0]}" if candidates else "in any cache"
    raise FileNotFoundError(
        f"got no {what} weights {place}, expected {source}; fetch it and give its place as {option}"
    )


def torch_hub_file(name: str) -> Path:
    """Where torch.hub and torchvision keep a downloaded file of this name."""
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def hugging_face_file(repository: str, name: str) -> list[Path]:
    """The file of that name in Hugging Face's cache, if it is there: one path or none."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, name)
    return [Path(found)] if isinstance(found, str) else []


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a .safetensors file or a torch file, which may hold nothing but tensors.

    Raises:
        ValueError: it is damaged, or holds something else.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        found: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch, pickle, zipfile and safetensors raise for damaged files has no common name
        raise ValueError(
            f"got {path}, which is no file of weights alone ({type(error).__name__}), expected tensors by name; fetch "
            "it again"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"got {path} with a {type(found).__name__}, expected tensors by name; give another file")
    return found


def load_strictly(network: nn.Module, state: dict[str, Tensor], path: Path, *, option: str) -> None:
    """Gives a network, which may be on the meta device, the tensors read from `path`.

    Raises:
        ValueError: names or shapes differ; the first few are named.
    """
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in state.items()}
    # Counters that old files lack and nobody reads.
    differ = [name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name)]
    differ = sorted(name for name in differ if not name.endswith("num_batches_tracked"))
    if differ:
        raise ValueError(
            f"got weights in {path} that differ in {len(differ)} tensors, e.g. {', '.join(differ[:3])}, expected those "
            f"of {type(network).__name__}; give the file of this very model as {option}"
        )
    # Half precision is for storage: features are computed in float32.
    wide = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    network.load_state_dict(wide, strict=False, assign=True)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, or of a folder's weights files in order of their names."""
    files = [path] if path.is_file() else sorted([*path.glob("*.safetensors"), *path.glob("*.bin")])
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def sha256_of_tensors(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of tensors and their names, whatever their order and device."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
