"""`ldm convert`: a model in one project's format becomes the same model in another's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from ldm.cli.chain import shown
from ldm.cli.console import heading, say
from ldm.cli.errors import UserError, closest, user_mistakes
from ldm.cli.sampling import read_loras

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ldm.interop import PretrainedModel

FORMATS = ("compvis", "diffusers", "ldm")
# Files that may hold code, which ldm reads with care and never writes.
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
DTYPES = ("float32", "float16", "bfloat16")


def convert(config: DictConfig, overrides: Sequence[str]) -> None:
    """Reads `source`, says what it is, and writes `out`.

    Raises:
        UserError: a setting is wrong, the source cannot be read, or the format cannot hold it.
    """
    source, out = _path(config, "source"), _path(config, "out")
    layout, name = _format(config, out), _dtype(config)
    if out.exists():
        raise UserError(f"out: got {out}, which exists already, expected a new path; name another, or remove it")
    with user_mistakes():
        model = read(source, config)
        refuse_new_words(model)
        merge_loras(model, read_loras(config.lora))
        say_what(model, source)
        notes = write(model, out, layout=layout, dtype=_torch_dtype(name))
    for note in notes:
        say(f"  note        {note}")
    heading(f"{layout}: {shown(out.absolute())}")


def read(source: Path, config: DictConfig) -> PretrainedModel:
    """The model at `source`, whoever wrote it.

    Raises:
        ValueError: it cannot be read, or a setting is given that has no effect on it.
    """
    from ldm.cli.foreign import pretrained_of
    from ldm.cli.load import load_own
    from ldm.interop import is_foreign, open_model

    told = {name: config[name] for name in ("prediction", "family", "config", "base") if config[name] is not None}
    if is_foreign(source):
        return open_model(source, **told, ema=config.ema)
    if told or not config.ema:
        name = next(iter(told), "ema")
        raise UserError(f"{name}: got {config[name]} for {source}, which ldm trained and which says it itself")
    return pretrained_of(load_own(source, trust=list(config.trust)))


def refuse_new_words(model: PretrainedModel) -> None:
    """Raises ValueError for a model that was taught words: no format of whole models holds them."""
    from ldm.interop.lora_layers import text_encoders

    words = {word for _, encoder in text_encoders(model.conditioner) for word in encoder.tokenizer.added}
    if words:
        raise ValueError(
            f"got a model that was taught {', '.join(sorted(words))}, expected one with CLIP's own words; convert the "
            "model that it was trained from, and use the run's embedding file beside it"
        )


def merge_loras(model: PretrainedModel, loras: Sequence[tuple[str, float]]) -> None:
    """Adds LoRAs to the weights for good, and those that the model was trained with.

    Raises:
        ValueError: a file is no LoRA of this model.
    """
    from ldm.interop.lora import apply_lora, bake

    for file, scale in loras:
        apply_lora(model.denoiser, model.conditioner, file, scale=scale)
    bake(model.denoiser, model.conditioner)


def say_what(model: PretrainedModel, source: Path) -> None:
    """Prints what was recognised, and by what."""
    family, origin = model.family, model.origin
    heading(f"{shown(source.absolute())}: {family.title}")
    say(f"  family      {family.name}, in the layout of {origin.layout}")
    say(f"  prediction  {family.prediction}, says {origin.prediction}")
    say(f"  weights     {origin.weights}")
    for name, part in (
        ("network", model.network),
        ("conditioner", model.conditioner),
        ("autoencoder", model.autoencoder),
    ):
        say(f"  {name:<11} {_size(part)}")
    if model.carried:
        say(f"  carried     {len(model.carried)} tensors that ldm does not read")
    for left_out in origin.left_out:
        say(f"  left out    {left_out}")


def write(model: PretrainedModel, out: Path, *, layout: str, dtype: torch.dtype | None) -> list[str]:
    """Writes a model in a format; gives what its user should know.

    Raises:
        ValueError: the format cannot hold it.
    """
    from ldm.interop import write_compvis, write_diffusers, write_ldm

    if layout == "compvis":
        _, config = write_compvis(model, out, dtype=dtype)
        return [f"its config is {config.name}, beside it", *_untold_notes(model)]
    if layout == "diffusers":
        return write_diffusers(model, out, dtype=dtype)
    if layout == "ldm":
        write_ldm(model, out, dtype=dtype)
        return []
    raise ValueError(f"got format={layout}, expected one of {', '.join(FORMATS)}")


def _untold_notes(model: PretrainedModel) -> list[str]:
    """What of text encoders a CompVis file keeps for ldm alone."""
    from ldm.interop.conditioning import untold_settings

    told = [{**settings.pop("config", {}), **settings} for settings in untold_settings(model.conditioner)]
    words = [f"{name} {value}" for settings in told for name, value in settings.items()]
    return [f"only ldm reads {', '.join(words)} of the text encoder: other programs compute it otherwise"] * bool(words)


def _path(config: DictConfig, name: str) -> Path:
    if config[name] is None:
        raise UserError(f"{name}: got none; write source=MODEL out=NAME.safetensors, or out=FOLDER for diffusers")
    return Path(str(config[name])).expanduser()


def _format(config: DictConfig, out: Path) -> str:
    """The format asked for; else a file is CompVis's and a folder diffusers'.

    Raises:
        UserError: there is no such format, or `out` is named like a file of another.
    """
    chosen = config.format or ("compvis" if out.suffix == ".safetensors" else "diffusers")
    if chosen not in FORMATS:
        near = closest(str(chosen), list(FORMATS))
        raise UserError(
            f"format: got {chosen}, expected one of {', '.join(FORMATS)}{f'; did you mean {near}?' if near else ''}"
        )
    if out.suffix in PICKLES or (chosen == "diffusers" and out.suffix == ".safetensors"):
        name = "a folder's" if config.format == "diffusers" else "NAME.safetensors, or a folder's for diffusers"
        raise UserError(f"out: got {out}, a file's name that format={chosen} does not write, expected {name}")
    return str(chosen)


def _dtype(config: DictConfig) -> str | None:
    if config.dtype is not None and config.dtype not in DTYPES:
        raise UserError(f"dtype: got {config.dtype}, expected null (as they are) or one of {', '.join(DTYPES)}")
    return None if config.dtype is None else str(config.dtype)


def _torch_dtype(name: str | None) -> torch.dtype | None:
    import torch

    return None if name is None else getattr(torch, name)


def _size(part: nn.Module) -> str:
    """How many tensors and parameters a part has, and of which type."""
    from ldm.interop.model import CarriedConditioner

    tensors = list(part.tensors.values() if isinstance(part, CarriedConditioner) else part.parameters())
    if not tensors:
        return f"{type(part).__name__}, without weights"
    types = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))
    name = f"{part.kind}, carried along" if isinstance(part, CarriedConditioner) else type(part).__name__
    total = sum(tensor.numel() for tensor in tensors)
    return f"{name}: {len(tensors)} tensors, {total / 1e6:.2f} M parameters, {types}"
