"""Encoding and decoding in half precision where its range does not suffice."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ldm.autoencoders.autoencoder import Autoencoder

Decode = Callable[[Autoencoder, Tensor], Tensor]


@torch.no_grad()
def encode_safely(autoencoder: Autoencoder, images: Tensor) -> Tensor:
    """Encode images (B, 3, H, W) into moments (B, M, h, w); where float16 overflows, warn and do it again in float32.

    As `decode_safely`: activations of the published SDXL autoencoder are too large both ways.
    """
    moments = autoencoder.encode(images)
    if not _has_overflowed(moments, images):
        return moments
    # One text at one place, so that Python's default filter shows it once a process.
    warnings.warn(
        "encoding overflowed float16 and was done again in float32, which is slower; train in bf16-mixed, or encode "
        "once and for all with ldm data encode",
        stacklevel=1,
    )
    return _exactly(autoencoder, images, lambda model, pictures: model.encode(pictures))


@torch.no_grad()
def decode_safely(autoencoder: Autoencoder, latents: Tensor, *, decode: Decode | None = None) -> Tensor:
    """Decode scaled latents (B, C, h, w); where float16 overflows, warn and do it again in float32.

    Activations of the published SDXL autoencoder pass 65504, the end of float16, and pictures come out black (NaN).
    The weights are float32 for the second call alone: the module has the same tensors afterwards. bfloat16 has
    float32's range and is not done again, nor are latents that are not finite themselves.

    Args:
        latents: of the autoencoder's dtype.
        decode: how to decode, `partial(decode_tiled, tile=64, overlap=16)` for one; None is `autoencoder.decode`.

    Returns:
        Images (B, 3, H, W), about in [-1, 1]; float32 where decoded again.
    """
    decode = decode or _decode_whole
    images = decode(autoencoder, latents)
    if not _has_overflowed(images, latents):
        return images
    warnings.warn(
        "decoding overflowed float16 and was done again in float32, which is slower; keep this autoencoder in "
        "bfloat16 or float32",
        stacklevel=1,
    )
    return _exactly(autoencoder, latents, decode)


def _has_overflowed(result: Tensor, source: Tensor) -> bool:
    """Whether float16 was too small for what came of finite numbers; the meta device has none to look at."""
    if result.dtype != torch.float16 or result.is_meta:
        return False
    return not result.isfinite().all() and bool(source.isfinite().all())


def _exactly(autoencoder: Autoencoder, source: Tensor, compute: Decode) -> Tensor:
    """Encode or decode by float32 copies of the weights, outside any autocast."""
    call = _Call(autoencoder, compute)
    tensors = {**dict(call.named_parameters()), **dict(call.named_buffers())}
    exact = {name: tensor.float() for name, tensor in tensors.items() if tensor.is_floating_point()}
    with torch.autocast(source.device.type, enabled=False):
        return functional_call(call, exact, (source.float(),))


class _Call(nn.Module):
    """Encoding or decoding as a forward pass, which is what can be called with other weights."""

    def __init__(self, autoencoder: Autoencoder, compute: Decode) -> None:
        super().__init__()
        self.autoencoder, self.compute = autoencoder, compute

    def forward(self, source: Tensor) -> Tensor:
        return self.compute(self.autoencoder, source)


def _decode_whole(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    return autoencoder.decode(latents)
