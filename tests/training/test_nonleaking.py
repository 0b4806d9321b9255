"""Augmentation that the network is told of: transformations by their closed forms, labels, and training with them."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ldm.autoencoders import IdentityAutoencoder
from ldm.conditioners import LowResolution, Unconditional
from ldm.data import ShardDataModule
from ldm.diffusion import Conditioning, Denoiser, Guidance, parameterizations, schedules, times, weightings
from ldm.generation import SamplingSettings
from ldm.networks import EDMUNet
from ldm.samplers import Euler, Trailing
from ldm.training import LatentDiffusionModule
from ldm.training.nonleaking import SYM6, NonLeakingAugmentation, warped
from ldm.training.optim import constant

OFF, ON = 1.0, 0.0  # of the gates
SIZE = 32


def uniforms(**chosen: float) -> Tensor:
    """u (1, 14) of a picture with these transformations, the others off; numbers are uniform ones."""
    names = ["down_gate", "scale_gate", "rotate_gate", "stretch_gate", "move_gate"]
    names += ["scale", "stretch", "right", "down", "spare", "angle", "direction", "mirror", "upside_down"]
    default = {name: OFF if name.endswith("gate") else 0.5 for name in names} | {"mirror": 1.0, "upside_down": 0.0}
    return torch.tensor([[(default | chosen)[name] for name in names]], dtype=torch.float64)


def normal_of(value: float) -> float:
    """The uniform number whose standard normal quantile is the value."""
    return float(torch.special.ndtr(torch.tensor(value, dtype=torch.float64)))


def wave(x: Tensor, y: Tensor) -> Tensor:
    """A smooth picture, of places in pixels from the centre."""
    return torch.exp(-((x - 3) ** 2 + 2 * (y + 2) ** 2) / 20)


def places() -> tuple[Tensor, Tensor]:
    line = torch.arange(SIZE, dtype=torch.float64) + 0.5 - SIZE / 2
    y, x = torch.meshgrid(line, line, indexing="ij")
    return x, y


def picture() -> Tensor:
    return wave(*places())[None, None]


AUGMENT = NonLeakingAugmentation(probability=0.5)


def test_the_filter_is_orthonormal_to_its_own_shifts_by_two() -> None:
    taps = torch.tensor(SYM6, dtype=torch.float64)
    products = [float((taps[2 * k :] * taps[: len(taps) - 2 * k]).sum()) for k in range(6)]
    assert products == pytest.approx([1, 0, 0, 0, 0, 0], abs=1e-10)
    assert float(taps.sum()) == pytest.approx(2**0.5)


def test_nothing_moves_where_nothing_is_moved() -> None:
    noise = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = warped(noise, torch.eye(3, dtype=torch.float64).expand(2, 3, 3))
    assert_close(found[..., 4:-4, 4:-4], noise[..., 4:-4, 4:-4], rtol=0, atol=1e-9)


def test_a_picture_that_is_left_alone_is_the_same_with_labels_of_zero() -> None:
    image, labels = AUGMENT(picture(), uniforms())
    assert_close(image, picture(), rtol=0, atol=0)
    assert labels.tolist() == [[0.0] * 9]


ANGLE = 0.3
CASES: dict[str, tuple[dict[str, float], list[float], Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]] = {
    "mirrored": ({"mirror": 0.2}, [1, 0, 0, 0, 0, 0, 0, 0, 0], lambda x, y: (-x, y)),
    "upside down": ({"down_gate": ON}, [0, 1, 0, 0, 0, 0, 0, 0, 0], lambda x, y: (x, -y)),
    "larger": (
        {"scale_gate": ON, "scale": normal_of(1.5)},
        [0, 0, 1.5, 0, 0, 0, 0, 0, 0],
        lambda x, y: (x / 2**0.3, y / 2**0.3),
    ),
    "rotated": (
        {"rotate_gate": ON, "angle": 0.5 + ANGLE / (2 * torch.pi)},
        [0, 0, 0, 0.955336489 - 1, 0.295520207, 0, 0, 0, 0],
        lambda x, y: (0.955336489 * x + 0.295520207 * y, -0.295520207 * x + 0.955336489 * y),
    ),
    "wider": (
        {"stretch_gate": ON, "stretch": normal_of(1.0), "direction": 0.5},
        [0, 0, 0, 0, 0, 1, 0, 0, 0],
        lambda x, y: (x / 2**0.2, y * 2**0.2),
    ),
    "higher": (
        {"stretch_gate": ON, "stretch": normal_of(1.0), "direction": 0.75},
        [0, 0, 0, 0, 0, 0, 1, 0, 0],
        lambda x, y: (x * 2**0.2, y / 2**0.2),
    ),
    "moved": (
        {"move_gate": ON, "right": normal_of(0.8), "down": normal_of(-0.5)},
        [0, 0, 0, 0, 0, 0, 0, 0.8, -0.5],
        lambda x, y: (x - 0.8 * SIZE / 8, y + 0.5 * SIZE / 8),
    ),
    "larger, then rotated, then moved": (
        {
            "scale_gate": ON,
            "scale": normal_of(1.5),
            "rotate_gate": ON,
            "angle": 0.5 + ANGLE / (2 * torch.pi),
            "move_gate": ON,
            "right": normal_of(0.8),
        },
        [0, 0, 1.5, 0.955336489 - 1, 0.295520207, 0, 0, 0.8, 0],
        lambda x, y: (
            (0.955336489 * (x - 3.2) + 0.295520207 * y) / 2**0.3,
            (-0.295520207 * (x - 3.2) + 0.955336489 * y) / 2**0.3,
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_transformation_shows_what_its_label_says(name: str) -> None:
    chosen, expected_labels, place_of = CASES[name]
    image, labels = AUGMENT(picture(), uniforms(**chosen))
    assert labels[0].tolist() == pytest.approx(expected_labels, abs=1e-6)
    assert_close(image[0, 0], wave(*place_of(*places())), rtol=0, atol=0.04)
    assert (image - picture()).abs().max() > 0.1


def test_the_share_of_pictures_that_change_is_the_probability() -> None:
    u = torch.rand(4000, 14, generator=torch.Generator().manual_seed(0))
    _, labels = NonLeakingAugmentation(probability=0.12)(torch.zeros(4000, 1, 8, 8), u)
    shares = (labels != 0).float().mean(0)
    assert_close(shares, torch.tensor([0.5, 0.06, *[0.12] * 7]), rtol=0, atol=0.02)


def make_module(nonleaking: NonLeakingAugmentation | None) -> LatentDiffusionModule:
    torch.manual_seed(0)
    network = EDMUNet(
        *(3, 3),
        model_channels=8,
        channel_mult=[1, 2],
        num_res_blocks=1,
        attention_resolutions=[2],
        embedding="sinusoidal",
        time_channels=8,
        augment_dim=9,
    )
    torch.nn.init.normal_(network.out_conv.weight)
    schedule = schedules.EDM()
    denoiser = Denoiser(
        network,
        schedule=schedule,
        parameterization=parameterizations.EDM(),
        weighting=weightings.EDM(),
        times=times.LogNormal(),
    )
    return LatentDiffusionModule(
        denoiser,
        conditioner=Unconditional(),
        autoencoder=IdentityAutoencoder(),
        optimizer=partial(torch.optim.Adam, lr=1e-3),
        lr_schedule=constant,
        sampling=SamplingSettings(Euler(), Trailing(), Guidance(), num_steps=2, image_size=16),
        nonleaking=nonleaking,
        ema_decay=0.5,
    )


def test_training_tells_the_network_and_validation_and_sampling_do_not(
    make_data: Callable[..., ShardDataModule], make_trainer: Callable[..., object]
) -> None:
    module, plain = make_module(NonLeakingAugmentation(probability=0.5)), make_module(None)
    told: list[Conditioning] = []
    for model in (module.trained, module.ema.module):
        model.denoiser.network.register_forward_pre_hook(lambda _, args: told.append(args[2]))
    trainer = make_trainer(max_steps=2)
    trainer.fit(module, make_data())  # type: ignore[attr-defined]
    assert [cond.context.shape for cond in told if cond.context is not None] == [(6, 1, 9)] * 2
    told.clear()
    found = trainer.validate(module, make_data(), verbose=False)  # type: ignore[attr-defined]
    module.sample([""], seeds=[0])
    assert [cond.context for cond in told] == [None] * len(told)
    plain.load_state_dict(module.state_dict())
    assert trainer.validate(plain, make_data(), verbose=False) == found  # type: ignore[attr-defined]


def test_how_a_picture_is_changed_belongs_to_its_place_in_the_stream() -> None:
    module = make_module(NonLeakingAugmentation(probability=0.9))
    batch = {
        "image": torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1,
        "caption": [""] * 4,
        "position": torch.arange(4) + 9,
    }
    whole = module.loss(batch, module.trained, 0, 0.0)
    parts = [module.loss({k: v[i : i + 2] for k, v in batch.items()}, module.trained, 0, 0.0) for i in (0, 2)]
    assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)
    other = module.loss(batch, module.ema.module, 0, 0.0)
    assert (other - whole).abs().min() > 1e-4


def test_pictures_that_the_network_is_told_of_are_refused_since_they_would_stay_as_they_were() -> None:
    module = make_module(NonLeakingAugmentation(probability=0.5))
    module.trained.conditioner = LowResolution(upscale=2)
    batch = {
        "image": torch.zeros(2, 3, 16, 16),
        "low_res": torch.zeros(2, 3, 8, 8),
        "caption": ["", ""],
        "position": torch.arange(2),
    }
    with pytest.raises(
        ValueError, match=r"^got model\.nonleaking with a conditioner of a context or a picture, expected"
    ):
        module.loss(batch, module.trained, 0, 0.0)
