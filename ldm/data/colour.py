"""From RGB to CIE L*a*b*, as a batch's pixels."""

import torch
from torch import Tensor

# sRGB (IEC 61966-2-1) to XYZ, and the white point D65 of two degrees.
_TO_XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))
_WHITE = (0.95047, 1.0, 1.08883)
# What a* and b* are divided by: sRGB reaches from -107.9 to 98.3.
AB_SCALE = 110.0


def rgb_to_lab(images: Tensor) -> Tensor:
    """Turn sRGB (B, 3, H, W) in [-1, 1] into (L* / 50 - 1, a* / 110, b* / 110), each within [-1, 1] (CIE 15)."""
    values = (images + 1) / 2
    linear = torch.where(values <= 0.04045, values / 12.92, ((values.clamp_min(0.04045) + 0.055) / 1.055) ** 2.4)
    matrix = (torch.tensor(_TO_XYZ) / torch.tensor(_WHITE)[:, None]).to(images)
    xyz = torch.einsum("ij,bjhw->bihw", matrix, linear)
    delta = 6 / 29
    f_x, f_y, f_z = torch.where(
        xyz > delta**3, xyz.clamp_min(delta**3) ** (1 / 3), xyz / (3 * delta**2) + 4 / 29
    ).unbind(1)
    return torch.stack([(116 * f_y - 16) / 50 - 1, 500 * (f_x - f_y) / AB_SCALE, 200 * (f_y - f_z) / AB_SCALE], dim=1)
