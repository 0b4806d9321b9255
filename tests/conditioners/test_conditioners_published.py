"""Full-size text encoders, on the meta device, against published parameter counts."""

from collections.abc import Callable

import pytest
import torch

from ldm.conditioners import CLIPText, Conditioner, OpenCLIPText, SizeCrop, T5Text, WordTokenizer
from ldm.conditioners.size_crop import SDXL_REFINER


def on_meta(make: Callable[[], Conditioner]) -> Conditioner:
    with torch.device("meta"):
        return make()


def millions(module: torch.nn.Module) -> float:
    return round(sum(p.numel() for name, p in module.named_parameters() if "logit_scale" not in name) / 1e6, 2)


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (CLIPText, 123.06),
        (lambda: OpenCLIPText(1024, 24, 16), 354.03),
        (lambda: OpenCLIPText(1280, 32, 20, pooled=True), 694.66),
        (lambda: T5Text(tokenizer=WordTokenizer(["a"])), 4762.31),
    ],
    ids=["clip_l", "open_clip_h", "open_clip_bigg", "t5_xxl"],
)
def test_parameter_counts_are_the_published_ones(make: Callable[[], Conditioner], count: float) -> None:
    assert millions(on_meta(make)) == count


def test_sdxls_conditions_have_the_widths_of_its_networks() -> None:
    clip = on_meta(lambda: CLIPText(layer=11, final_norm=False, null="zeros"))
    bigg = on_meta(lambda: OpenCLIPText(1280, 32, 20, final_norm=False, pooled=True, null="zeros"))
    base = [part.null(2) for part in (clip, bigg, SizeCrop())]
    refiner = [part.null(2) for part in (bigg, SizeCrop(SDXL_REFINER))]
    for parts, context, vector in ((base, 2048, 2816), (refiner, 1280, 2560)):
        assert sum(part.context.shape[-1] for part in parts if part.context is not None) == context
        assert sum(part.vector.shape[-1] for part in parts if part.vector is not None) == vector
