"""The U-Net of ADM: ours, with a learned variance."""

from torch import Tensor

from ldm.diffusion.conditioning import Conditioning
from ldm.networks.unet import UNet


class ADMUNet(UNet):
    """A `UNet` whose out_channels hold the output and after it, in as many channels, the variance of a reverse step.

    Arguments and parameter names are those of `UNet`. Source: Nichol and Dhariwal 2021; Dhariwal and Nichol 2021.
    """

    learned_variance = True

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Map x (B, C, H, W) at network times t (B,) under cond to (B, out_channels, H, W), half of it the variance.

        Raises:
            ValueError: out_channels is odd, besides the reasons of `UNet`.
        """
        both = super().forward(x, t, cond)
        if both.shape[1] % 2:
            raise ValueError(
                f"got out_channels {both.shape[1]}, expected an even number; give the output and its variance as many "
                "channels each"
            )
        return both
