"""Constructor arguments read back from names and shapes."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from unet_geometries import NAMES, geometries, on_meta, published, shapes

from ldm.interop.unet import unet_geometry

UNTOLD = {"num_heads", "num_head_channels", "new_attention_order", "dropout", "norm_groups", "checkpoint_blocks"}


def normal(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments without what a network of theirs does not show: settings of levels that do not attend."""
    levels = range(len(arguments["channel_mult"]))
    attends = [2**level in arguments["attention_resolutions"] for level in levels]
    depths, without_self = arguments["transformer_depth"], arguments["disable_self_attention"]
    depths = [depths] * len(attends) if isinstance(depths, int) else list(depths)
    depths = [depth if used else 1 for depth, used in zip(depths, [*attends[:-1], True], strict=True)]
    without_self = [
        without and used for without, used in zip(without_self or [False] * len(depths), attends, strict=True)
    ]
    blocks = arguments["num_res_blocks"]
    return {key: value for key, value in arguments.items() if key not in UNTOLD} | {
        "channel_mult": list(arguments["channel_mult"]),
        "num_res_blocks": [blocks] * len(attends) if isinstance(blocks, int) else list(blocks),
        "attention_resolutions": [2**level for level in levels if attends[level]],
        "transformer_depth": depths,
        "disable_self_attention": without_self,
    }


@pytest.mark.parametrize("name", NAMES)
def test_published_geometry_is_read_from_names_and_shapes(name: str) -> None:
    unet = on_meta(published(name))

    found = unet_geometry(unet.state_dict())

    assert normal(found) == normal(unet.arguments)
    assert set(unet.arguments) - set(found) == UNTOLD


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("sdxl_base", "transformer_depth", [1, 2, 10]),
        ("sdxl_refiner", "transformer_depth", 4),
        ("sdxl_base", "num_res_blocks", 2),
        ("sd2", "disable_self_attention", None),
        ("ldm_semantic", "attention_resolutions", []),
    ],
)
def test_geometry_is_told_in_the_words_of_the_configs(name: str, argument: str, value: object) -> None:
    assert unet_geometry(on_meta(published(name)).state_dict())[argument] == value


@given(geometries())
@settings(max_examples=30, deadline=None)
def test_any_geometry_is_read_from_names_and_shapes(arguments: dict[str, Any]) -> None:
    unet = on_meta(arguments)

    found = unet_geometry(unet.state_dict())

    assert normal(found) == normal(unet.arguments)
    assert shapes(on_meta({**found, "num_heads": 2, "norm_groups": 4}).state_dict()) == shapes(unet.state_dict())


def test_weights_of_something_else_are_refused() -> None:
    with pytest.raises(ValueError, match=r"without output_blocks\.0\.0\.in_layers\.0\.weight, expected a U-Net"):
        unet_geometry({"encoder.conv_in.weight": torch.empty(1, device="meta")})
