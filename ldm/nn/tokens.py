"""From images to tokens and back, attention among tokens, and embeddings of time, class and vector."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.nn.embeddings import timestep_embedding

TIME_FREQUENCIES = 256


class PatchEmbedding(nn.Module):
    """One token for every patch_size x patch_size patch: (B, C, H, W) to (B, H W / patch_size^2, width), row-major."""

    def __init__(self, in_channels: int, width: int, *, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Embed x, whose H and W are multiples of the patch size."""
        return rearrange(self.proj(x), "b d h w -> b (h w) d").contiguous()


def image_of_patches(tokens: Tensor, *, rows: int, patch_size: int) -> Tensor:
    """Tokens (B, N, patch_size^2 C), row-major in `rows` rows, as an image (B, C, H, W)."""
    pattern = "b (h w) (p q c) -> b c (h p) (w q)"
    return rearrange(tokens, pattern, h=rows, p=patch_size, q=patch_size)


def tokens_at(tokens: Tensor, places: Tensor) -> Tensor:
    """Of tokens (B, N, D) those at places (B, K) int64 in [0, N): (B, K, D)."""
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))


def tokens_put(tokens: Tensor, places: Tensor, *, num: int) -> Tensor:
    """Tokens (B, K, D) at their places (B, K) int64 among (B, num, D): zero where there is none, a sum of several."""
    room = tokens.new_zeros(len(tokens), num, tokens.shape[-1])
    return room.scatter_add(1, places[..., None].expand_as(tokens), tokens)


class HeadNorm(nn.RMSNorm):
    """Divides queries or keys (B, heads, N, width) by their root mean square; learned scale, in the input's dtype."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x."""
        # Under autocast the scale is float32 and the input is not, for which there is no fused kernel.
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class SelfAttention(nn.Module):
    """Multi-head attention among tokens (B, N, width), in steps, so that two streams can attend jointly.

    With qk_norm the queries and keys of each head are RMS-normalised with a learned scale (Esser et al. 2024).
    A stream that only tells others (`project` False) has no queries to normalise and no output.
    Raises ValueError when the width does not divide into the heads.
    """

    def __init__(self, width: int, *, num_heads: int, qk_norm: bool = False, project: bool = True) -> None:
        super().__init__()
        if num_heads < 1 or width % num_heads:
            raise ValueError(
                f"got a width of {width} for {num_heads} attention heads, expected a multiple of the heads; change "
                "width or num_heads"
            )
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        head_width = width // num_heads
        self.ln_q = HeadNorm(head_width) if qk_norm and project else nn.Identity()
        self.ln_k = HeadNorm(head_width) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width) if project else None

    def forward(self, tokens: Tensor) -> Tensor:
        """Attend among tokens (B, N, width)."""
        return self.merged(F.scaled_dot_product_attention(*self.heads(tokens)))

    def heads(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (B, heads, N, width / heads) each."""
        pattern = "b n (three h d) -> three b h n d"
        q, k, v = rearrange(self.qkv(tokens), pattern, three=3, h=self.num_heads)
        return self.ln_q(q), self.ln_k(k), v

    def merged(self, heads: Tensor) -> Tensor:
        """What the heads (B, heads, N, width / heads) found, as tokens (B, N, width)."""
        assert self.proj is not None, "a stream without projection has no output"
        return self.proj(rearrange(heads, "b h n d -> b n (h d)"))


class TimeEmbedder(nn.Module):
    """Times (B,) to (B, width), by sines and cosines, 256 together, and two layers."""

    def __init__(
        self, width: int, *, frequencies: int = TIME_FREQUENCIES, activation: Callable[[], nn.Module] = nn.SiLU
    ) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = _two_layers(frequencies, width, activation)

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Embed t; the layers compute in the given dtype."""
        return self.mlp(timestep_embedding(t, self.frequencies).to(dtype))


class VectorEmbedder(nn.Module):
    """Vectors (B, dim) to (B, width), by two layers."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.mlp = _two_layers(dim, width)

    def forward(self, vector: Tensor) -> Tensor:
        """Embed the vector."""
        return self.mlp(vector)


class ClassEmbedder(nn.Module):
    """Class ids (B,) in [0, num_classes] to (B, width); the id num_classes means "no class" and is learned too."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, ids: Tensor) -> Tensor:
        """Look the ids up."""
        return self.embedding_table(ids)


def _two_layers(dim: int, width: int, activation: Callable[[], nn.Module] = nn.SiLU) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, width), activation(), nn.Linear(width, width))
