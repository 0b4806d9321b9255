"""Autoencoders to diffusers and back: the same weights, the same outputs, and refusals by name."""

import importlib
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from torch import Tensor, nn

from ldm.autoencoders import Autoencoder, IdentityAutoencoder, KLAutoencoder, VQAutoencoder
from ldm.interop.autoencoder import (
    autoencoder_class,
    autoencoder_from_diffusers,
    autoencoder_geometry,
    autoencoder_to_diffusers,
)
from ldm.interop.autoencoder_keys import attending_levels, attention_arguments

CONF = Path(__file__).parents[2] / "conf" / "autoencoder"
KINDS = {"ldm.autoencoders.KLAutoencoder": "AutoencoderKL", "ldm.autoencoders.VQAutoencoder": "VQModel"}
CONFIGS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(CONF.glob("*.yaml"))}
NAMES = [name for name, config in CONFIGS.items() if config["_target_"] in KINDS]
UNTOLD = {"dropout", "norm_groups", "latent_scale", "latent_shift", "codebook_weight", "commitment_weight"}


def published(name: str) -> Autoencoder:
    """The autoencoder of conf/autoencoder/NAME.yaml on the meta device."""
    config = dict(CONFIGS[name])
    module, _, attribute = config.pop("_target_").rpartition(".")
    with torch.device("meta"):
        return getattr(importlib.import_module(module), attribute)(**config)


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def other_model(kind: str, config: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    model = getattr(diffusers, kind)(**config).eval()
    model.load_state_dict(state)
    return model


def back(kind: str, config: dict[str, Any], state: dict[str, Tensor]) -> Autoencoder:
    arguments, weights = autoencoder_from_diffusers({"_class_name": kind, **config}, state)
    autoencoder = autoencoder_class(arguments)(**arguments).eval()
    autoencoder.load_state_dict(weights)
    return autoencoder


def random_autoencoder(cls: type[Autoencoder], **arguments: Any) -> Autoencoder:
    torch.manual_seed(0)
    return cls(base_channels=32, **arguments).eval()


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def assert_computes_the_same(autoencoder: Autoencoder, other: nn.Module) -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    scale, shift = other.config.scaling_factor, getattr(other.config, "shift_factor", None) or 0.0
    with torch.no_grad():
        moments = autoencoder.encode(images)
        encoded = other.encode(images)
        values = encoded.latents if isinstance(autoencoder, VQAutoencoder) else encoded.latent_dist.mode()
        theirs = values if isinstance(autoencoder, VQAutoencoder) else encoded.latent_dist.parameters
        latents = autoencoder.to_latents(moments, noise=None)

        assert relative_difference(moments, theirs) <= 1e-4
        assert relative_difference(latents, (values - shift) * scale) <= 1e-4
        decoded = other.decode(latents / scale + shift).sample
        assert relative_difference(autoencoder.decode(latents), decoded) <= 1e-4


def assert_same_weights(actual: Autoencoder, expected: Autoencoder) -> None:
    ours, theirs = actual.state_dict(), expected.state_dict()
    assert set(ours) == set(theirs)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("name", NAMES)
def test_published_geometry_is_read_from_names_and_shapes(name: str) -> None:
    autoencoder = published(name)

    found = autoencoder_geometry(autoencoder.state_dict())

    told = {key: value for key, value in autoencoder.arguments.items() if key not in UNTOLD}
    assert found == told | {"attn_resolutions": list(told["attn_resolutions"])}
    assert autoencoder_class(found) is type(autoencoder)


@pytest.mark.parametrize("name", NAMES)
def test_published_geometry_has_the_names_and_shapes_of_diffusers(name: str) -> None:
    autoencoder = published(name)

    kind, config, state = autoencoder_to_diffusers(autoencoder)
    with torch.device("meta"):
        other = getattr(diffusers, kind)(**config)
    arguments, weights = autoencoder_from_diffusers({"_class_name": kind, **config}, state)

    assert kind == KINDS[CONFIGS[name]["_target_"]]
    assert shapes(state) == shapes(other.state_dict())
    assert shapes(weights) == shapes(autoencoder.state_dict())
    untold = {"dropout", "codebook_weight", "commitment_weight"}
    told = {key: value for key, value in autoencoder.arguments.items() if key not in untold}
    if kind == "VQModel":
        del told["latent_shift"]
    assert arguments == told | {"attn_resolutions": list(told["attn_resolutions"])}


STRUCTURES: dict[str, tuple[type[Autoencoder], dict[str, Any]]] = {
    "KL": (KLAutoencoder, {"channel_mult": [1, 2, 2]}),
    "KL, attention on levels": (
        KLAutoencoder,
        {"channel_mult": [1, 1, 2], "attn_resolutions": [16, 8], "resolution": 32, "latent_channels": 6},
    ),
    "KL, no attention": (KLAutoencoder, {"channel_mult": [1, 2], "attention_type": "none", "num_res_blocks": 1}),
    "KL, scale, shift and norm groups": (
        KLAutoencoder,
        {"channel_mult": [1, 2], "latent_scale": 0.18215, "latent_shift": 0.0609, "norm_groups": 16},
    ),
    "VQ": (VQAutoencoder, {"channel_mult": [1, 2, 2], "num_codes": 17}),
    "VQ, attention on levels": (
        VQAutoencoder,
        {"channel_mult": [1, 2], "attn_resolutions": [16], "resolution": 32, "latent_channels": 4, "num_codes": 9},
    ),
    "VQ, no attention, scale": (
        VQAutoencoder,
        {"channel_mult": [1, 2], "attention_type": "none", "num_codes": 9, "latent_scale": 1.7},
    ),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_structure_computes_the_same_in_diffusers_and_comes_back_bit_equal(name: str) -> None:
    cls, arguments = STRUCTURES[name]
    autoencoder = random_autoencoder(cls, **arguments)

    kind, config, state = autoencoder_to_diffusers(autoencoder)
    other = other_model(kind, config, state)
    returned = back(kind, config, state)

    assert_computes_the_same(autoencoder, other)
    assert_same_weights(returned, autoencoder)
    assert_computes_the_same(returned, other)


def test_measured_scale_comes_back_bit_equal_and_reads_as_it_was_written() -> None:
    autoencoder = random_autoencoder(KLAutoencoder, channel_mult=[1])
    for scale in (0.18215, 0.13025, 0.08333, 1 / 3, 1.0):
        autoencoder.set_latent_scale(scale, -scale)

        kind, config, state = autoencoder_to_diffusers(autoencoder)

        assert_same_weights(back(kind, config, state), autoencoder)
        assert config["scaling_factor"] == pytest.approx(scale, rel=1e-7)
        assert scale == 1 / 3 or config["scaling_factor"] == scale


@pytest.mark.parametrize("kept", [(), ("use_quant_conv",), ("use_post_quant_conv",)])
def test_missing_quantisation_convolutions_become_identities(kept: tuple[str, ...]) -> None:
    autoencoder = random_autoencoder(KLAutoencoder, channel_mult=[1, 2])
    kind, config, state = autoencoder_to_diffusers(autoencoder)
    absent = {"use_quant_conv": "quant_conv", "use_post_quant_conv": "post_quant_conv"}
    config |= {field: field in kept for field in absent}
    gone = tuple(f"{absent[field]}." for field in absent if field not in kept)
    state = {name: value for name, value in state.items() if not name.startswith(gone)}

    assert_computes_the_same(back(kind, config, state), other_model(kind, config, state))


@pytest.mark.parametrize("convolutional", [False, True])
def test_former_names_of_attention_weights_are_read(convolutional: bool) -> None:
    autoencoder = random_autoencoder(KLAutoencoder, channel_mult=[1, 2], attn_resolutions=[16], resolution=32)
    kind, config, state = autoencoder_to_diffusers(autoencoder)
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in state.items():
        for new, old in former.items():
            name = name.replace(f".{new}.", f".{old}.")
        renamed[name] = value[:, :, None, None] if convolutional and name not in state and value.ndim > 1 else value

    assert set(renamed) != set(state)
    assert_same_weights(back(kind, config, renamed), autoencoder)


@pytest.mark.parametrize(("kind", "scale"), [("AutoencoderKL", 0.18215), ("VQModel", 1.0)])
def test_config_from_before_the_scale_had_a_field_means_the_scale_of_its_time(kind: str, scale: float) -> None:
    state = getattr(diffusers, kind)().state_dict()

    arguments, weights = autoencoder_from_diffusers({"_class_name": kind}, state)

    autoencoder_class(arguments)(**arguments).load_state_dict(weights)
    assert arguments["latent_scale"] == scale


def test_weights_are_views_of_the_autoencoder() -> None:
    autoencoder = random_autoencoder(KLAutoencoder, channel_mult=[1, 2])
    _, _, state = autoencoder_to_diffusers(autoencoder)

    assert {value.data_ptr() for value in state.values()} == {value.data_ptr() for value in autoencoder.parameters()}


REFUSED_SETTINGS = [
    ("AutoencoderKL", "act_fn", "relu"),
    ("AutoencoderKL", "block_out_channels", [32, 80]),
    ("AutoencoderKL", "down_block_types", ["DownEncoderBlock2D"]),
    ("AutoencoderKL", "down_block_types", ["DownEncoderBlock2D", "SkipDownBlock2D"]),
    ("AutoencoderKL", "latents_mean", [0.0] * 4),
    ("AutoencoderKL", "latents_std", [1.0] * 4),
    ("AutoencoderKL", "out_channels", 1),
    ("AutoencoderKL", "up_block_types", ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]),
    ("VQModel", "lookup_from_codebook", True),
    ("VQModel", "norm_type", "spatial"),
    ("VQModel", "vq_embed_dim", 7),
]


@pytest.mark.parametrize(("kind", "field", "value"), REFUSED_SETTINGS)
def test_setting_that_our_autoencoder_cannot_compute_is_refused_by_name(kind: str, field: str, value: object) -> None:
    cls = KLAutoencoder if kind == "AutoencoderKL" else VQAutoencoder
    _, config, state = autoencoder_to_diffusers(random_autoencoder(cls, channel_mult=[1, 2]))

    with pytest.raises(ValueError, match=rf"^got {field} .* in the config of a {kind}, expected [^\n]+; "):
        autoencoder_from_diffusers({"_class_name": kind, **config, field: value}, state)


def test_another_class_is_refused() -> None:
    with pytest.raises(ValueError, match="'AutoencoderTiny', expected AutoencoderKL or VQModel"):
        autoencoder_from_diffusers({"_class_name": "AutoencoderTiny"}, {})


def test_autoencoder_that_diffusers_cannot_hold_is_refused() -> None:
    wide = random_autoencoder(KLAutoencoder, channel_mult=[2, 2])
    shifted = random_autoencoder(VQAutoencoder, channel_mult=[1], latent_shift=0.5)

    with pytest.raises(ValueError, match=r"channel_mult \[2, 2\]"):
        autoencoder_to_diffusers(wide)
    with pytest.raises(ValueError, match=r"latent_shift 0\.5"):
        autoencoder_to_diffusers(shifted)
    with pytest.raises(ValueError, match="got a IdentityAutoencoder"):
        autoencoder_to_diffusers(IdentityAutoencoder())


def test_geometry_of_a_first_level_wider_than_the_first_convolution_is_read() -> None:
    assert autoencoder_geometry(random_autoencoder(KLAutoencoder, channel_mult=[2, 2]).state_dict())[
        "channel_mult"
    ] == [
        2,
        2,
    ]


def test_attention_is_placed_on_any_number_of_levels() -> None:
    arguments = {"channel_mult": [1] * 11, **attention_arguments([False] * 9 + [True, True])}

    assert attending_levels(arguments) == [False] * 9 + [True, True]


def test_weights_of_something_else_are_refused() -> None:
    state = dict(published("sd").state_dict())
    state["post_quant_conv.weight"] = torch.empty(4, 3, 1, 1, device="meta")

    with pytest.raises(ValueError, match="latents of 3 channels for a decoder of 4"):
        autoencoder_geometry(state)
    with pytest.raises(ValueError, match=r"without encoder\.conv_in\.weight, expected an autoencoder"):
        autoencoder_geometry({"out.2.weight": torch.empty(1, device="meta")})


def test_sample_size_is_a_field_of_the_config() -> None:
    _, config, _ = autoencoder_to_diffusers(published("sd"), sample_size=512)

    assert config["sample_size"] == 512
