"""The U-Net of ADM: ours, with a learned variance."""

from torch import Tensor

from ldm.diffusion.conditioning import Conditioning
from ldm.networks.unet import UNet


class ADMUNet(UNet):
    """A `UNet` whose out_channels hold the output and after it, in as many channels, the variance of a reverse step.

    `forward` gives the first half, (B, out_channels / 2, H, W), which is all that a denoiser takes. Arguments and
    parameter names are those of `UNet`. Source: Nichol and Dhariwal 2021; Dhariwal and Nichol 2021.
    """

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Map x (B, C, H, W) at network times t (B,) under cond to (B, out_channels / 2, H, W)."""
        return self.forward_with_variance(x, t, cond)[0]

    def forward_with_variance(self, x: Tensor, t: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor]:
        """What `forward` gives, and as many channels that say the variance; ValueError for an odd out_channels."""
        both = super().forward(x, t, cond)
        if both.shape[1] % 2:
            raise ValueError(
                f"got out_channels {both.shape[1]}, expected an even number; give the output and its variance as many "
                "channels each"
            )
        mean, variance = both.chunk(2, dim=1)
        return mean, variance
