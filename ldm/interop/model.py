"""A pretrained model in our own parts, and the strict way in which weights get into them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ldm.autoencoders import Autoencoder
from ldm.conditioners import Conditioner
from ldm.diffusion import Denoiser
from ldm.diffusion.parameterizations import X0, Epsilon, Parameterization, V
from ldm.diffusion.schedules import Cosine, DiscreteSchedule, Linear, ScaledLinear, rescale_to_zero_terminal_snr
from ldm.diffusion.times import UniformSteps
from ldm.diffusion.weightings import Unit
from ldm.interop import families
from ldm.interop.families import Family
from ldm.interop.safe_load import named
from ldm.networks import UNet

ModuleT = TypeVar("ModuleT", bound=nn.Module)
PARAMETERIZATIONS: dict[str, type[Parameterization]] = {families.EPSILON: Epsilon, families.V: V, families.X_0: X0}
SCALE = ("latent_scale", "latent_shift")


@dataclass(frozen=True)
class Origin:
    """Where a model came from, for people.

    Args:
        layout: of the file: CompVis, diffusers or ldm.
        prediction: where it is said what the network predicts.
        weights: which copy of the network's weights was taken.
        left_out: what the source holds besides, and was not taken.
    """

    layout: str
    prediction: str
    weights: str = "the only ones"
    left_out: tuple[str, ...] = ()

    @property
    def is_overruled(self) -> bool:
        """Whether the user's word about the prediction is against a stored one."""
        return ", although " in self.prediction


@dataclass(frozen=True)
class PretrainedModel:
    """The parts of a model from another project, ready for a `Pipeline`.

    Args:
        denoiser, conditioner, autoencoder: in evaluation mode, in the precision of the file.
        family: with everything filled in, the prediction too.
        carried: tensors under CompVis names that no part of ours reads, kept so that writing loses nothing.
    """

    denoiser: Denoiser
    conditioner: Conditioner
    autoencoder: Autoencoder
    family: Family
    origin: Origin
    carried: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def network(self) -> UNet:
        """The denoiser's U-Net.

        Raises:
            ValueError: it is another network.
        """
        network = self.denoiser.network
        if not isinstance(network, UNet):
            raise ValueError(f"got a {type(network).__name__}, expected a UNet; other formats hold no other network")
        return network


class CarriedConditioner(Conditioner):
    """The place of a conditioner that ldm does not have: it holds the tensors, so that they can be written again.

    Args:
        kind: what it is called in messages.
        tensors: under CompVis names without `cond_stage_model.`.
    """

    def __init__(self, kind: str, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.kind, self.tensors = kind, dict(tensors)

    def forward(self, batch: dict[str, Any]) -> Any:
        """Raises ValueError: there is nothing to condition with."""
        raise ValueError(
            f"got a model with a conditioner of kind {self.kind}, which ldm cannot run; convert it, or give its "
            "denoiser a Conditioning of your own"
        )

    def null(self, n: int) -> Any:
        """Raises ValueError as `forward` does."""
        return self({})


def build_denoiser(network: nn.Module, family: Family) -> Denoiser:
    """The network with the family's schedule and prediction, in evaluation mode."""
    assert family.prediction is not None
    return Denoiser(
        network,
        schedule=schedule_of(family),
        parameterization=PARAMETERIZATIONS[family.prediction](),
        weighting=Unit(),
        times=UniformSteps(),
    ).eval()


def schedule_of(family: Family) -> DiscreteSchedule:
    """The noise schedule that a family was trained with."""
    num_steps, start, end = family.num_training_steps, family.beta_start, family.beta_end
    plain: DiscreteSchedule
    if family.betas == "scaled_linear":
        plain = ScaledLinear(num_steps=num_steps, beta_start=start, beta_end=end)
    elif family.betas == "linear":
        plain = Linear(num_steps=num_steps, beta_start=start, beta_end=end)
    elif family.betas == "cosine":
        plain = Cosine(num_steps=num_steps)
    else:
        raise ValueError(f"got a schedule with betas {family.betas}, expected scaled_linear, linear or cosine")
    return DiscreteSchedule(rescale_to_zero_terminal_snr(betas_of(plain))) if family.zero_terminal_snr else plain


def betas_of(schedule: DiscreteSchedule) -> Tensor:
    """(T,) float64, the variances of the forward steps."""
    alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), schedule.alphas_cumprod])
    return 1 - alpha_bar[1:] / alpha_bar[:-1]


def arguments_of(module: nn.Module) -> dict[str, Any]:
    """What a module was constructed with.

    Raises:
        ValueError: it does not keep its arguments.
    """
    arguments = getattr(module, "arguments", None)
    if not isinstance(arguments, dict):
        raise ValueError(
            f"got a {type(module).__name__}, which does not tell how it was built, so it cannot be written"
        )
    return arguments


def fill(module: ModuleT, state: Mapping[str, Tensor], *, part: str, tolerated: str = "") -> ModuleT:
    """Puts tensors into a module that was built on the meta device, without copying them; in evaluation mode.

    Args:
        part: what to call the module.
        tolerated: names that may be there and are passed over, a regular expression.

    Raises:
        ValueError: tensors are missing, left over, or of another shape, by name.
    """
    own = module.state_dict()
    given = {name: tensor for name, tensor in state.items() if name in own or not re.fullmatch(tolerated, name)}
    missing, unexpected = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    wrong = sorted(name for name in own.keys() & given.keys() if own[name].shape != given[name].shape)
    told = [f"{len(missing)} missing: {named(missing)}"] if missing else []
    told += [f"{len(unexpected)} unexpected: {named(unexpected)}"] if unexpected else []
    told += [f"{_shape(given[name])} instead of {_shape(own[name])} for {name}" for name in wrong[:3]]
    if told:
        raise ValueError(
            f"got {part} whose tensors do not fit: {'; '.join(told)}; expected {len(own)} tensors; "
            "is it of another family, or only part of a model?"
        )
    module.load_state_dict(given, assign=True)
    return module.eval()


def check_base(path: Path, base: PretrainedModel | None, *, lacks_text: bool, lacks_autoencoder: bool) -> None:
    """Compares what a source lacks with whether there is a base to take it from.

    Raises:
        ValueError: parts are lacking and there is no base, or there is one and nothing to take from it.
    """
    lacking = [name for name, lacks in (("text encoder", lacks_text), ("autoencoder", lacks_autoencoder)) if lacks]
    if lacking and base is None:
        raise ValueError(
            f"got {path}, which holds no {' and no '.join(lacking)}, expected a whole model; give base=MODEL, another "
            "of its family, to take what is missing from"
        )
    if base is not None and not lacking:
        raise ValueError(
            f"got base= for {path}, which holds all its parts, expected a model without its text encoder or "
            "autoencoder; leave base out"
        )


def scale_buffers(scale: float, shift: float = 0.0) -> dict[str, Tensor]:
    """The two scalars that an autoencoder's state holds besides the published tensors."""
    return dict(zip(SCALE, (torch.tensor(scale), torch.tensor(shift)), strict=True))


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))
