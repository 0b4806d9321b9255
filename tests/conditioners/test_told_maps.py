"""Maps of classes and of depths, as networks are told of them."""

import pytest
import torch
from torch.testing import assert_close

from ldm.conditioners import DepthMap, SemanticMap
from ldm.generation.image_to_image import depth_condition


def test_classes_are_halved_as_shares_and_then_mixed() -> None:
    conditioner = SemanticMap(3, channels=2, num_stages=1)
    classes = torch.tensor([[[[0, 0, 1, 2], [0, 1, 1, 2]]]])
    shares = torch.tensor([[[0.75, 0.0]], [[0.25, 0.5]], [[0.0, 0.5]]])
    weight = conditioner.channel_mapper.weight[:, :, 0, 0]
    found = conditioner({"classes": classes})
    assert_close(found.concat[0], torch.einsum("ck,khw->chw", weight, shares))
    found.concat.sum().backward()
    assert conditioner.channel_mapper.weight.grad.abs().sum() > 0


def test_the_published_rescaler_has_as_many_weights() -> None:
    assert sum(p.numel() for p in SemanticMap().parameters()) == 182 * 3


def test_depth_is_told_as_sampling_tells_it() -> None:
    depth = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 200
    depth[1] = 5.0
    found = DepthMap(8)({"depth": depth}).concat
    assert_close(found[:1], depth_condition(depth[:1], torch.zeros(1, 4, 4, 4)))
    assert (found[1] == 0).all()


@pytest.mark.parametrize("conditioner", [SemanticMap(4), DepthMap(8)])
def test_a_map_is_told_in_any_case(conditioner: SemanticMap | DepthMap) -> None:
    assert conditioner.always_told == ("concat",)
    assert conditioner.null(3).parts() == {}
    with pytest.raises(ValueError, match=r"set derive=\w+_map"):
        conditioner({"caption": [""]})


def test_a_class_out_of_range_is_named() -> None:
    with pytest.raises(ValueError, match="got a map with class 7, expected 0 to 3"):
        SemanticMap(4)({"classes": torch.full((1, 1, 4, 4), 7)})
