"""Modules that remember how they were built."""

from torch import nn

from ldm.networks import UNet
from ldm.nn.arguments import keeps_arguments


class Scaled(nn.Module):
    @keeps_arguments
    def __init__(self, width: int, *, scale: float = 2.0) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)


def test_arguments_are_kept_by_name_with_defaults() -> None:
    assert Scaled(3).arguments == {"width": 3, "scale": 2.0}
    assert Scaled(width=3, scale=1.0).arguments == {"width": 3, "scale": 1.0}


def test_a_network_is_rebuilt_from_its_arguments() -> None:
    unet = UNet(
        4, 4, model_channels=32, channel_mult=[1, 2], num_res_blocks=1, attention_resolutions=[2], num_head_channels=8
    )
    again = UNet(**unet.arguments)
    assert {name: p.shape for name, p in again.named_parameters()} == {n: p.shape for n, p in unet.named_parameters()}
    assert again.arguments == unet.arguments
