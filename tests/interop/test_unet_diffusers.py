"""U-Nets to diffusers and back: the same weights, the same outputs, and refusals by name."""

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from hypothesis import given, settings
from torch import Tensor, nn
from unet_geometries import (
    HEADS_BY_NUMBER_OVER_PIXELS,
    HELD_BY_DIFFUSERS,
    geometries,
    on_meta,
    other_model,
    published,
    random_unet,
    seeded,
    shapes,
    tiny,
)

from ldm.diffusion.conditioning import Conditioning
from ldm.interop.unet import state_from_diffusers, state_to_diffusers, unet_from_diffusers, unet_to_diffusers
from ldm.networks import UNet
from ldm.nn import timestep_embedding

TIMES = torch.tensor([3.0, 750.0])


def back(name: str, config: dict[str, Any], state: dict[str, Tensor]) -> UNet:
    """The network of ours for a model of diffusers, strictly loaded."""
    arguments, weights = unet_from_diffusers({"_class_name": name, **config}, state)
    unet = UNet(**arguments).eval()
    unet.load_state_dict(weights)
    return unet


def conditions(unet: UNet) -> tuple[Conditioning, dict[str, Any]]:
    """A condition for ours, and the same as keyword arguments of diffusers' model."""
    arguments = unet.arguments
    vector: Tensor | None = None
    if arguments["num_classes"] is not None:
        vector = torch.tensor([2, arguments["num_classes"] - 1])
    elif arguments["vector_dim"] is not None:
        vector = seeded((2, arguments["vector_dim"]), 3)
    labels = {} if vector is None else {"class_labels": vector}
    if arguments["context_dim"] is None:
        return Conditioning(vector=vector), labels
    context = seeded((2, 5, arguments["context_dim"]), 2)
    return Conditioning(context=context, vector=vector), {"encoder_hidden_states": context, **labels}


def difference(unet: UNet, other: nn.Module) -> float:
    """Largest difference of the outputs, as a share of the largest output."""
    x = seeded((2, unet.in_channels, 16, 16), 1)
    cond, keywords = conditions(unet)
    with torch.no_grad():
        actual, expected = unet(x, TIMES, cond), other(x, TIMES, **keywords).sample
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def assert_same_weights(unet: UNet, expected: UNet) -> None:
    ours, theirs = unet.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("name", HELD_BY_DIFFUSERS)
def test_published_geometry_has_the_names_and_shapes_of_diffusers(name: str) -> None:
    unet = on_meta(published(name))

    kind, config, state = unet_to_diffusers(unet)
    arguments, weights = unet_from_diffusers({"_class_name": kind, **config}, state)

    assert shapes(state) == shapes(other_model(kind, config).state_dict())
    assert shapes(weights) == shapes(unet.state_dict())
    assert shapes(on_meta(arguments).state_dict()) == shapes(unet.state_dict())


@pytest.mark.parametrize("name", HELD_BY_DIFFUSERS)
def test_published_structure_computes_the_same_in_diffusers_and_comes_back_bit_equal(name: str) -> None:
    unet = random_unet(tiny(name))

    kind, config, state = unet_to_diffusers(unet)
    returned = back(kind, config, state)

    assert difference(unet, other_model(kind, config, state)) <= 1e-4
    if not unet.arguments["new_attention_order"]:  # which comes back in the other order, as tested below
        assert_same_weights(returned, unet)
    assert difference(returned, other_model(kind, config, state)) <= 1e-4


@pytest.mark.parametrize("name", HEADS_BY_NUMBER_OVER_PIXELS)
def test_heads_by_number_over_pixels_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"8 heads of .* expected heads of one width"):
        unet_to_diffusers(on_meta(published(name)))


@pytest.mark.parametrize("name", HEADS_BY_NUMBER_OVER_PIXELS)
def test_weights_with_heads_by_number_are_right_once_diffusers_is_told_the_heads(name: str) -> None:
    # Only the config cannot say it; names, shapes and the order of rows are those of diffusers.
    arguments = tiny(name)
    unet = random_unet(arguments)
    state = state_to_diffusers(unet.state_dict(), arguments)
    kind, config, _ = unet_to_diffusers(on_meta({**arguments, "num_heads": None, "num_head_channels": 4}))
    other = other_model(kind, config, state)
    for module in other.modules():
        if isinstance(module, Attention):
            module.heads = arguments["num_heads"]

    returned = state_from_diffusers(state, arguments)

    assert difference(unet, other) <= 1e-4
    assert [name for name, value in unet.state_dict().items() if not torch.equal(value, returned[name])] == []


SMALL = {"in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": [1, 2, 2], "num_heads": 4}
PIXELS = {**SMALL, "num_res_blocks": 1, "num_heads": None, "num_head_channels": 8, "attention_resolutions": [2, 4]}
TEXT = {**SMALL, "context_dim": 24, "num_res_blocks": 1, "attention_resolutions": [2, 4]}
STRUCTURES: dict[str, dict[str, Any]] = {
    "one head a level over pixels": {**PIXELS, "num_heads": 1, "num_head_channels": None},
    "classes over pixels": {**PIXELS, "num_classes": 5},
    "scale and shift, strided": {**PIXELS, "use_scale_shift_norm": True},
    "blocks by level": {**TEXT, "num_res_blocks": [1, 3, 2]},
    "depth by level, linear": {**TEXT, "transformer_depth": [1, 2, 3], "use_linear_projection": True},
    "heads by width": {**TEXT, "num_heads": None, "num_head_channels": 16},
    "a vector as it is": {**TEXT, "vector_dim": 11},
    "no self-attention by level": {**TEXT, "disable_self_attention": [True, True, False]},
    "only the middle attends, resampling blocks": {**TEXT, "attention_resolutions": [], "resblock_updown": True},
    "one level": {**TEXT, "channel_mult": [1], "attention_resolutions": [1]},
    "other norm groups": {**TEXT, "norm_groups": 8},
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_structure_computes_the_same_in_diffusers_and_comes_back_bit_equal(name: str) -> None:
    unet = random_unet(STRUCTURES[name])

    kind, config, state = unet_to_diffusers(unet)
    returned = back(kind, config, state)

    assert difference(unet, other_model(kind, config, state)) <= 1e-4
    assert_same_weights(returned, unet)
    assert difference(returned, other_model(kind, config, state)) <= 1e-4


def holdable(arguments: dict[str, Any]) -> dict[str, Any]:
    """The nearest geometry that a class of diffusers has room for; see UNHOLDABLE for the four things that none has."""
    held = {**arguments, "channel_mult": [1, *arguments["channel_mult"][1:]]}
    if "context_dim" in held:
        return held | {"resblock_updown": held["resblock_updown"] and not held["attention_resolutions"]}
    heads = {"num_heads": None, "num_head_channels": 4}
    return held | heads | {"num_res_blocks": held["num_res_blocks"][0], "vector_dim": None}


@given(geometries())
@settings(max_examples=20, deadline=None)
def test_any_geometry_has_the_names_and_shapes_of_diffusers(arguments: dict[str, Any]) -> None:
    unet = on_meta(holdable(arguments))

    kind, config, state = unet_to_diffusers(unet)
    returned, weights = unet_from_diffusers({"_class_name": kind, **config}, state)

    assert shapes(state) == shapes(other_model(kind, config).state_dict())
    assert shapes(weights) == shapes(unet.state_dict())
    assert shapes(on_meta(returned).state_dict()) == shapes(unet.state_dict())


def test_the_other_order_of_qkv_rows_computes_the_same_in_diffusers_and_back() -> None:
    unet = random_unet({**PIXELS, "new_attention_order": True})
    old = UNet(**PIXELS).eval()
    old.load_state_dict(unet.state_dict())

    kind, config, state = unet_to_diffusers(unet)
    other = other_model(kind, config, state)

    assert difference(unet, other) <= 1e-4
    assert difference(back(kind, config, state), other) <= 1e-4
    assert difference(old, other) > 1e-2


def test_sizes_embedded_in_diffusers_equal_the_vector_of_stable_diffusion_xl() -> None:
    unet = random_unet(tiny("sdxl_base"))
    kind, config, state = unet_to_diffusers(unet, size_embed_dim=8)
    x, context, pooled = seeded((2, 4, 16, 16), 1), seeded((2, 5, 24), 2), seeded((2, 10), 3)
    sizes = torch.tensor([[512.0, 640, 0, 16, 512, 512]]).expand(2, 6)
    vector = torch.cat([pooled, timestep_embedding(sizes.flatten(), 8).reshape(2, 48)], dim=1)

    with torch.no_grad():
        actual = unet(x, TIMES, Conditioning(context=context, vector=vector))
        added = {"text_embeds": pooled, "time_ids": sizes}
        expected = other_model(kind, config, state)(x, TIMES, context, added_cond_kwargs=added).sample

    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    assert_same_weights(back(kind, config, state), unet)


def test_former_names_of_attention_weights_are_read() -> None:
    unet = random_unet(PIXELS)
    kind, config, state = unet_to_diffusers(unet)
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in state.items():
        for new, old in former.items():
            name = name.replace(f".{new}.", f".{old}.")
        renamed[name] = value

    assert set(renamed) != set(state)
    assert_same_weights(back(kind, config, renamed), unet)


def test_sines_before_cosines_are_read() -> None:
    kind, config, state = unet_to_diffusers(random_unet(PIXELS))
    config["flip_sin_to_cos"] = False

    assert difference(back(kind, config, state), other_model(kind, config, state)) <= 1e-4


def test_heads_that_differ_only_where_no_level_attends_are_read() -> None:
    kind, config, state = unet_to_diffusers(random_unet(TEXT))
    config["attention_head_dim"] = [7, 4, 4]

    assert back(kind, config, state).arguments["num_head_channels"] == 16


def test_no_depth_where_no_level_attends_is_read() -> None:
    unet = random_unet(TEXT)
    kind, config, state = unet_to_diffusers(unet)
    config["transformer_layers_per_block"] = [0, 1, 1]

    assert_same_weights(back(kind, config, state), unet)


def test_no_self_attention_anywhere_leaves_it_in_the_middle() -> None:
    unet = random_unet({**TEXT, "disable_self_attention": [True, True, True]})
    kind, config, state = unet_to_diffusers(unet)
    config["only_cross_attention"] = True

    returned = back(kind, config, state)

    assert_same_weights(returned, unet)
    assert difference(returned, other_model(kind, config, state)) <= 1e-4


def test_a_silent_config_means_the_defaults_of_diffusers() -> None:
    for kind in ("UNet2DConditionModel", "UNet2DModel"):
        arguments, weights = unet_from_diffusers({"_class_name": kind}, other_model(kind, {}).state_dict())

        assert shapes(on_meta(arguments).state_dict()) == shapes(weights)


def test_weights_are_views_where_only_the_name_changes() -> None:
    unet = random_unet(TEXT)
    _, _, state = unet_to_diffusers(unet)

    assert {value.data_ptr() for value in state.values()} == {value.data_ptr() for value in unet.state_dict().values()}


REFUSED_SETTINGS = {
    "UNet2DConditionModel": {
        "act_fn": "gelu",
        "addition_embed_type": "text_image",
        "attention_head_dim": [4, 2, 8],
        "attention_type": "gated",
        "block_out_channels": [32, 64, 80],
        "center_input_sample": True,
        "class_embed_type": "timestep",
        "class_embeddings_concat": True,
        "conv_in_kernel": 1,
        "conv_out_kernel": 1,
        "cross_attention_dim": [24, 24, 16],
        "cross_attention_norm": "layer_norm",
        "down_block_types": ["DownBlock2D", "SimpleCrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "downsample_padding": 0,
        "dual_cross_attention": True,
        "encoder_hid_dim": 16,
        "encoder_hid_dim_type": "text_proj",
        "freq_shift": 1,
        "mid_block_scale_factor": 2,
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "norm_eps": 1e-6,
        "norm_num_groups": None,
        "resnet_out_scale_factor": 2.0,
        "resnet_skip_time_act": True,
        "resnet_time_scale_shift": "ada_group",
        "reverse_transformer_layers_per_block": [1, 1, 1],
        "time_cond_proj_dim": 256,
        "time_embedding_act_fn": "silu",
        "time_embedding_dim": 64,
        "time_embedding_type": "fourier",
        "timestep_post_act": "silu",
        "transformer_layers_per_block": [1, [1, 2], 1],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
    },
    "UNet2DModel": {
        "add_attention": False,
        "attn_norm_num_groups": 8,
        "class_embed_type": "identity",
        "down_block_types": ["DownBlock2D", "SkipDownBlock2D", "AttnDownBlock2D"],
        "mid_block_type": None,
        "time_embedding_type": "learned",
        "upsample_type": "resnet",
    },
}
REFUSALS = [(kind, field, value) for kind, fields in REFUSED_SETTINGS.items() for field, value in fields.items()]


@pytest.mark.parametrize(("kind", "field", "value"), REFUSALS)
def test_setting_that_our_network_cannot_compute_is_refused_by_name(kind: str, field: str, value: object) -> None:
    _, config, state = unet_to_diffusers(on_meta(PIXELS if kind == "UNet2DModel" else TEXT))

    with pytest.raises(ValueError, match=r"^got \w+ .* in the config of a UNet2D\w*Model, expected [^\n]+; ") as error:
        unet_from_diffusers({"_class_name": kind, **config, field: value}, state)

    assert f"got {field} " in str(error.value)


def test_another_class_is_refused() -> None:
    with pytest.raises(ValueError, match="'Transformer2DModel', expected UNet2DConditionModel or UNet2DModel"):
        unet_from_diffusers({"_class_name": "Transformer2DModel"}, {})


UNHOLDABLE = {
    "a wider first level": ({**TEXT, "channel_mult": [2, 2, 4]}, r"channel_mult \[2, 2, 4\]"),
    "blocks by level over pixels": ({**PIXELS, "num_res_blocks": [1, 2, 1]}, r"num_res_blocks \[1, 2, 1\]"),
    "a vector over pixels": ({**PIXELS, "vector_dim": 8}, "vector_dim 8"),
    "resampling blocks beside transformers": ({**TEXT, "resblock_updown": True}, "resblock_updown"),
}


@pytest.mark.parametrize("name", UNHOLDABLE)
def test_network_that_diffusers_cannot_compute_is_refused_by_argument(name: str) -> None:
    arguments, message = UNHOLDABLE[name]

    with pytest.raises(ValueError, match=message):
        unet_to_diffusers(on_meta(arguments))


@pytest.mark.parametrize("arguments", [TEXT, PIXELS])
def test_sizes_without_a_vector_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="size_embed_dim"):
        unet_to_diffusers(on_meta(arguments), size_embed_dim=8)


def test_names_without_a_place_stay_as_they_are() -> None:
    kind, config, state = unet_to_diffusers(on_meta(PIXELS))
    state["extra.weight"] = state.pop("mid_block.attentions.0.to_q.weight")

    _, weights = unet_from_diffusers({"_class_name": kind, **config}, state)

    missing, unexpected = on_meta(PIXELS).load_state_dict(weights, strict=False, assign=True)
    assert missing == ["middle_block.1.qkv.weight"]
    assert unexpected == ["mid_block.attentions.0.to_k.weight", "mid_block.attentions.0.to_v.weight", "extra.weight"]
