import torch
from torch import nn
from torch.testing import assert_close

from ldm.training.frozen import drop_frozen, freeze, frozen_prefixes, restore_frozen


def make(seed: int = 0) -> nn.ModuleDict:
    torch.manual_seed(seed)
    inner = nn.Sequential(nn.Linear(2, 2), freeze(nn.BatchNorm1d(2)))
    return nn.ModuleDict({"net": nn.Linear(2, 2), "encoder": freeze(nn.Linear(2, 2)), "encoder_head": inner})


def test_freezing_stops_gradients_and_dropout() -> None:
    module = freeze(nn.Sequential(nn.Linear(2, 2), nn.Dropout()))
    assert not any(part.training for part in module.modules())
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_only_frozen_submodules_are_dropped_with_their_buffers() -> None:
    module = make()
    assert frozen_prefixes(module) == ("encoder.", "encoder_head.1.")
    kept = {"net.weight", "net.bias", "encoder_head.0.weight", "encoder_head.0.bias"}
    assert set(drop_frozen(module, module.state_dict())) == kept


def test_what_was_dropped_is_put_back_from_the_module_and_loads_strictly() -> None:
    saved, other = make(0), make(1)
    encoder = other["encoder"].weight.clone()
    other.load_state_dict(restore_frozen(other, drop_frozen(saved, saved.state_dict())), strict=True)
    assert_close(other["net"].weight, saved["net"].weight, rtol=0, atol=0)
    assert_close(other["encoder"].weight, encoder, rtol=0, atol=0)


def test_a_module_without_frozen_parts_keeps_everything() -> None:
    module = nn.Linear(2, 2)
    assert drop_frozen(module, module.state_dict()).keys() == module.state_dict().keys()
