"""Single files as CompVis and Stability AI publish them: read into our parts, and written from them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.autoencoders import Autoencoder, KLAutoencoder, VQAutoencoder
from ldm.interop.autoencoder import autoencoder_class, autoencoder_geometry
from ldm.interop.compvis_yaml import is_stability, write_yaml
from ldm.interop.conditioning import (
    TextPart,
    build_conditioner,
    compvis_state,
    text_kind,
    text_parts,
    untold_settings,
)
from ldm.interop.families import Family
from ldm.interop.model import (
    SCALE,
    Origin,
    PretrainedModel,
    arguments_of,
    build_denoiser,
    check_base,
    fill,
    scale_buffers,
    schedule_of,
)
from ldm.interop.resolve import resolve_family, resolve_prediction
from ldm.interop.safe_load import WeightsFile, named
from ldm.interop.safe_save import write_file
from ldm.interop.stored_config import (
    TEXT_ENCODERS,
    StoredConfig,
    prediction_in_file,
    read_yaml,
    text_settings_in_file,
    yaml_beside,
)
from ldm.interop.unet import unet_geometry
from ldm.networks import UNet

NETWORK, FIRST_STAGE, MOVING_AVERAGE = "model.diffusion_model.", "first_stage_model.", "model_ema."
TEXT = ("cond_stage_model.", "conditioner.")
# Other networks of a file, kept as they are: the depth estimator of SD 2 depth.
CARRIED = ("depth_model.",)
# What follows from the config, and training's own.
RECOMPUTED = re.compile(
    r"betas|(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?|posterior_\w+|lvlb_weights|logvar"
    r"|denoiser\.sigmas|scale_factor|v_pred|ztsnr|low_scale_model\..*"
)


@dataclass(frozen=True)
class _Parts:
    """A file's tensors by the part that they belong to, without prefixes."""

    network: dict[str, Tensor]
    first_stage: dict[str, Tensor]
    carried: dict[str, Tensor]
    weights: str
    left_out: tuple[str, ...]


def read_compvis(
    path: Path,
    file: WeightsFile,
    *,
    prediction: str | None = None,
    family: str | None = None,
    config: Path | None = None,
    ema: bool = True,
    base: PretrainedModel | None = None,
) -> PretrainedModel:
    """A single file as a model in our parts; for the arguments see `open_model`.

    Raises:
        ValueError: the file is no such model, tensors are missing or left over, or what shapes do not tell is unknown.
    """
    parts = _split(path, file.state, ema=ema)
    stored = read_yaml(config) if config else read_yaml(beside) if (beside := yaml_beside(path)) else None
    geometry = unet_geometry(parts.network)
    texts = _texts(path, file, stored)
    lacks_text = not texts and geometry["context_dim"] is not None
    check_base(path, base, lacks_text=lacks_text, lacks_autoencoder=not parts.first_stage)
    kind = text_kind(texts, has_vector=geometry["vector_dim"] is not None)
    chosen = resolve_family(path, geometry, kind, family=family, stored=stored)
    chosen, said_by = resolve_prediction(path, chosen, given=prediction, stored=_stored_predictions(file, stored))
    chosen = replace(chosen, zero_terminal_snr=chosen.zero_terminal_snr or "ztsnr" in file.state)
    _check_schedule(path, file.state, chosen)
    with torch.device("meta"):
        network = UNet(**{**geometry, **chosen.heads})
    fill(network, parts.network, part=f"the U-Net of {path.name}")
    chosen, scale = _latent_scale(path, chosen, file.state)
    autoencoder = base.autoencoder if base and not parts.first_stage else _autoencoder(path, parts.first_stage, scale)
    if stored and stored.latent_size and chosen.name == "custom":
        chosen = replace(chosen, image_size=stored.latent_size * autoencoder.downsampling_factor)
    built = build_conditioner(kind, texts, vector_dim=geometry["vector_dim"], image_size=chosen.image_size)
    return PretrainedModel(
        build_denoiser(network, chosen),
        base.conditioner if base and lacks_text else built,
        autoencoder,
        chosen,
        Origin("CompVis", said_by, parts.weights, parts.left_out),
        parts.carried,
    )


def write_compvis(model: PretrainedModel, path: Path | str, *, dtype: torch.dtype | None = None) -> list[Path]:
    """Writes one .safetensors file under CompVis names, and its config as a yaml beside it.

    Args:
        dtype: precision of all floating-point tensors but the scale of latents; None leaves each as it is.

    Returns:
        The two files.

    Raises:
        ValueError: a part that such files cannot hold.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"got out={path}, expected a name that ends in .safetensors")
    _check_expressible(model)
    autoencoder = model.autoencoder.state_dict()
    state = {f"{NETWORK}{name}": tensor for name, tensor in model.network.state_dict().items()}
    state |= {f"{FIRST_STAGE}{name}": tensor for name, tensor in autoencoder.items() if name not in SCALE}
    state |= {**compvis_state(model.conditioner), **model.carried}
    if model.family.latent_scale is None and not is_stability(model):
        state["scale_factor"] = model.autoencoder.latent_scale
    metadata = {"modelspec.prediction_type": str(model.family.prediction)}
    if any(untold := untold_settings(model.conditioner)):
        metadata[TEXT_ENCODERS] = json.dumps(untold)
    config = write_yaml(model, path.with_suffix(".yaml"))
    write_file(path, state, metadata=metadata, dtype=dtype)
    return [path, config]


def check_average(path: Path, *, ema: bool, there: bool) -> None:
    """Raises ValueError where the plain weights are asked for and are the only ones, so that asking has no effect."""
    if not ema and not there:
        raise ValueError(
            f"got ema=false for {path}, which holds no moving average, expected one beside the plain weights; leave "
            "ema out"
        )


def _check_expressible(model: PretrainedModel) -> None:
    """Raises ValueError for what neither shapes nor CompVis's yaml can say."""
    autoencoder = model.autoencoder
    if not isinstance(autoencoder, KLAutoencoder | VQAutoencoder):
        raise ValueError(
            f"got a {type(autoencoder).__name__}, expected a KLAutoencoder or VQAutoencoder in CompVis files"
        )
    shift = float(autoencoder.latent_shift)
    groups = {
        name: arguments_of(part)["norm_groups"]
        for name, part in (("U-Net", model.network), ("autoencoder", autoencoder))
    }
    got = [f"norm_groups {number} in its {part}" for part, number in groups.items() if number != 32]
    got += [f"latents shifted by {shift:g}"] if shift else []
    if got:
        raise ValueError(
            f"got a model with {' and '.join(got)}, expected no shift and 32 groups, as CompVis's code has it; write "
            "format=diffusers"
        )


def _split(path: Path, state: Mapping[str, Tensor], *, ema: bool) -> _Parts:
    plain = _under(state, NETWORK) or _bare_network(state)
    averaged = {name: state[key] for name in plain if (key := _average_name(name)) in state}
    if averaged and len(averaged) < len(plain):
        absent = [name for name in plain if name not in averaged]
        raise ValueError(f"got {path}, whose moving average lacks {named(absent)}, expected all of it; set ema=false")
    if not plain:
        raise ValueError(f"got {path}, {_what(state)}, expected a model with {NETWORK}*; {_remedy(state)}")
    first_stage = {k: v for k, v in _under(state, FIRST_STAGE).items() if not k.startswith(("loss.", "model_ema."))}
    known = (NETWORK, FIRST_STAGE, MOVING_AVERAGE, *TEXT, *CARRIED)
    others = [name for name in state if not name.startswith(known) and not RECOMPUTED.fullmatch(name)]
    if unknown := [name for name in others if name.removeprefix("diffusion_model.") not in plain]:
        lacking = _lacking(plain, first_stage)
        without = f" and without {len(lacking)} that it should have ({named(lacking)})" if lacking else ""
        raise ValueError(
            f"got {path} with {len(unknown)} unexpected tensors ({named(unknown)}){without}, expected none besides "
            f"{', '.join(known)}; is it of another kind of model?"
        )
    check_average(path, ema=ema, there=bool(averaged))
    use_average = bool(averaged) and ema
    left_out = [name for name in ("noise schedule buffers",) if "betas" in state or "alphas_cumprod" in state]
    left_out += ["the plain weights beside the moving average"] if use_average else []
    left_out += ["the moving average"] if averaged and not ema else []
    carried = {name: tensor for name, tensor in state.items() if name.startswith(CARRIED)}
    weights = "the moving average (model_ema)" if use_average else "the plain weights" if averaged else "the only ones"
    return _Parts(averaged if use_average else plain, first_stage, carried, weights, tuple(left_out))


def _lacking(network: Mapping[str, Tensor], first_stage: Mapping[str, Tensor]) -> list[str]:
    """The tensors that a U-Net and an autoencoder of their geometry have besides, as far as the geometry shows."""
    lacking: list[str] = []
    with suppress(ValueError), torch.device("meta"):
        own = UNet(**unet_geometry(network), num_heads=1).state_dict().keys()
        lacking += [f"{NETWORK}{name}" for name in sorted(own - network.keys())]
    with suppress(ValueError), torch.device("meta"):
        arguments = autoencoder_geometry(first_stage)
        own = autoencoder_class(arguments)(**arguments).state_dict().keys()
        lacking += [f"{FIRST_STAGE}{name}" for name in sorted(own - first_stage.keys() - set(SCALE))]
    return lacking


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}


def _bare_network(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A U-Net that was saved by itself."""
    if "diffusion_model.input_blocks.0.0.weight" in state:
        return _under(state, "diffusion_model.")
    return dict(state) if "input_blocks.0.0.weight" in state else {}


def _average_name(name: str) -> str:
    """Where LDM's moving average keeps a parameter: without dots, as names of buffers cannot hold them."""
    return f"{MOVING_AVERAGE}diffusion_model{name.replace('.', '')}"


def _what(state: Mapping[str, Tensor]) -> str:
    if any("lora_" in name or ".lora" in name for name in state):
        return "a LoRA file"
    if any(name.startswith(("down_blocks.", "unet.down_blocks.")) for name in state):
        return "one component of a diffusers folder"
    if any(name.removeprefix(FIRST_STAGE).startswith("encoder.conv_in") for name in state):
        return "an autoencoder alone"
    return f"a file of {len(state)} tensors such as {next(iter(state))}"


def _remedy(state: Mapping[str, Tensor]) -> str:
    if "LoRA" in _what(state):
        return "give it as a LoRA beside a model"
    return "give the whole folder" if "folder" in _what(state) else "name the file of a whole model"


def _texts(path: Path, file: WeightsFile, stored: StoredConfig | None) -> list[TextPart]:
    parts = text_parts(file.state)
    noted = text_settings_in_file(file, [part.kind for part in parts])
    return [
        replace(part, settings={**_settings(path, part.kind, stored), **own})
        for part, own in zip(parts, noted, strict=True)
    ]


def _settings(path: Path, kind: str, stored: StoredConfig | None) -> Mapping[str, Any]:
    """What lies beside a file about its text encoder: a layer in its yaml, or BERT's vocabulary."""
    if kind == "bert":
        vocabulary = path.with_name("vocab.txt")
        return {"vocabulary": vocabulary if vocabulary.is_file() else None}
    return stored.text if stored else {}


def _latent_scale(path: Path, family: Family, state: Mapping[str, Tensor]) -> tuple[Family, float]:
    """(family, the scale of its latents): the measured one that the file holds, or else the family's."""
    if "scale_factor" in state:
        return replace(family, latent_scale=None), float(state["scale_factor"])
    if family.latent_scale is None:
        raise ValueError(
            f"got {path}, {family.title}, without scale_factor, the measured scale of its latents; give the whole "
            "checkpoint"
        )
    return family, family.latent_scale


def _stored_predictions(file: WeightsFile, stored: StoredConfig | None) -> list[tuple[str, str]]:
    found = [(stored.prediction, stored.source)] if stored and stored.prediction else []
    said = prediction_in_file(file)
    return found + ([said] if said else [])


def _check_schedule(path: Path, state: Mapping[str, Tensor], family: Family) -> None:
    """Compares the buffers of a checkpoint with the schedule that the family says."""
    if "alphas_cumprod" not in state or family.zero_terminal_snr:
        return
    theirs, ours = state["alphas_cumprod"].double(), schedule_of(family).alphas_cumprod
    # Some files hold the buffer in half precision.
    if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=2e-3, atol=1e-4):
        raise ValueError(
            f"got {path} with an alphas_cumprod of {len(theirs)} steps down to {theirs[-1].item():.4g}, expected "
            f"{family.name}'s {len(ours)} steps down to {ours[-1].item():.4g}; give its yaml by config=..."
        )


def _autoencoder(path: Path, state: Mapping[str, Tensor], scale: float) -> Autoencoder:
    arguments = autoencoder_geometry(state)
    with torch.device("meta"):
        autoencoder = autoencoder_class(arguments)(**arguments, latent_scale=scale)
    return fill(autoencoder, {**state, **scale_buffers(scale)}, part=f"the autoencoder of {path.name}")
