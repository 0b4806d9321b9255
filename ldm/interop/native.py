"""A pretrained model as one file of ours that says all about itself: no yaml, no word about its prediction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.conditioners import Combined, Tokenizer
from ldm.interop.families import Family
from ldm.interop.model import CarriedConditioner, Origin, PretrainedModel, arguments_of, build_denoiser, fill
from ldm.interop.safe_save import cast
from ldm.nn.weights import save_weights

TARGET = "ldm.interop.PretrainedModel"
PARTS = ("network", "conditioner", "autoencoder")


def write_ldm(model: PretrainedModel, path: Path | str, *, dtype: torch.dtype | None = None) -> Path:
    """Writes the three parts with their constructors' arguments, and the family, to one .safetensors file.

    Args:
        dtype: precision of all floating-point tensors but the latent scale; None leaves each as it is.

    Raises:
        ValueError: a part that does not know its arguments.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"got out={path}, expected a name that ends in .safetensors")
    modules = _modules(model)
    state = {f"{part}.{name}": tensor for part, module in modules.items() for name, tensor in _state(module).items()}
    state = {name: cast(name, tensor, dtype) for name, tensor in state.items()}
    state |= {f"carried.{name}": tensor for name, tensor in model.carried.items()}
    config = {part: describe(module) for part, module in modules.items()}
    save_weights(path, state, target=TARGET, config={**config, "family": asdict(model.family)})
    return path


def read_ldm(path: Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> PretrainedModel:
    """The model in such a file.

    Raises:
        ValueError: the file is damaged, or of another version.
    """
    try:
        known = {item.name for item in fields(Family)}
        told = {name: value for name, value in config["family"].items() if name in known}
        family = Family(**{**told, "contexts": tuple(told["contexts"])})
        with torch.device("meta"):
            empty = {part: rebuild(config[part]) for part in PARTS}
    except (KeyError, TypeError, AttributeError, ImportError) as error:
        raise ValueError(f"got {path}, whose description does not fit this version of ldm ({error})") from error
    filled = {part: _filled(module, _under(state, f"{part}."), part) for part, module in empty.items()}
    return PretrainedModel(
        build_denoiser(filled["network"], family),
        filled["conditioner"],  # type: ignore[arg-type]
        filled["autoencoder"],  # type: ignore[arg-type]
        family,
        Origin("ldm", "the file"),
        _under(state, "carried."),
    )


def describe(module: nn.Module) -> dict[str, Any]:
    """A module's class and the arguments that rebuild it, as plain values.

    Raises:
        ValueError: it does not keep its arguments.
    """
    if isinstance(module, CarriedConditioner):
        return {"class": _name(module), "arguments": {"kind": module.kind, "tensors": {}}}
    if isinstance(module, Combined):
        parts = [describe(part) for part in module.conditioners]
        return {"class": _name(module), "arguments": {"conditioners": parts}}
    # A tokenizer's vocabulary is a file of its own, which no weights hold.
    arguments = arguments_of(module)
    plain = {name: None if isinstance(value, Tokenizer) else value for name, value in arguments.items()}
    return {"class": _name(module), "arguments": plain}


def rebuild(description: Mapping[str, Any]) -> nn.Module:
    """The untrained module of a description; only classes of ldm's own are called."""
    module, _, name = str(description["class"]).rpartition(".")
    if not module.startswith("ldm."):
        raise KeyError(f"class {description['class']}")
    made = getattr(import_module(module), name)
    if not (isinstance(made, type) and issubclass(made, nn.Module)):
        raise KeyError(f"class {description['class']}")
    arguments = dict(description["arguments"])
    if "conditioners" in arguments:
        arguments["conditioners"] = [rebuild(part) for part in arguments["conditioners"]]
    built: nn.Module = made(**arguments)
    return built


def _modules(model: PretrainedModel) -> dict[str, nn.Module]:
    return dict(zip(PARTS, (model.network, model.conditioner, model.autoencoder), strict=True))


def _state(module: nn.Module) -> dict[str, Tensor]:
    return module.tensors if isinstance(module, CarriedConditioner) else module.state_dict()


def _filled(module: nn.Module, state: dict[str, Tensor], part: str) -> nn.Module:
    if isinstance(module, CarriedConditioner):
        return CarriedConditioner(module.kind, state)
    return fill(module, state, part=f"the {part}")


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"
