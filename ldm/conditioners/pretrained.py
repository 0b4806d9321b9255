"""Finding pretrained encoders: a local path or a hub id, and one clear error where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any


@contextmanager
def explained(path: Path | str, *, holds: str, source: str) -> Iterator[None]:
    """Turns a library's failure to read a model into one line.

    Args:
        holds: what the path should hold.
        source: where to get it.

    Raises:
        ValueError: the files are missing, damaged or of another model.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, SafetensorError, UnpicklingError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"got {path}, which cannot be read ({reason}), expected {holds}; give a local path, or a hub id that this "
            f"machine can reach, such as {source}"
        ) from error


def from_transformers(architecture: type[Any], path: Path | str, *, source: str, **options: Any) -> Any:
    """A model of transformers from a local folder or the hub, in float32, with every weight it needs.

    Raises:
        ValueError: it cannot be read, or weights are missing.
    """
    with explained(path, holds="a folder with config.json and model.safetensors", source=source):
        import torch

        model, report = architecture.from_pretrained(
            str(path), dtype=torch.float32, output_loading_info=True, **options
        )
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"{len(missing)} weights are missing, first {missing[0]}")
    return model
