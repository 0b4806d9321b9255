import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from ldm.nn.modulation import Modulation, modulate
from ldm.nn.tokens import PatchEmbedding, SelfAttention, image_of_patches


def test_patches_become_the_image_that_they_came_from() -> None:
    image = torch.randn(2, 3, 6, 9)
    patches = rearrange(image, "b c (h p) (w q) -> b (h w) (p q c)", p=3, q=3)

    torch.testing.assert_close(image_of_patches(patches, rows=2, patch_size=3), image, rtol=0, atol=0)


def test_a_patch_embedding_is_a_linear_map_of_each_patch_row_by_row() -> None:
    embed = PatchEmbedding(3, 5, patch_size=2)
    image = torch.randn(2, 3, 4, 6)
    patches = rearrange(image, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)

    expected = F.linear(patches, embed.proj.weight.flatten(1), embed.proj.bias)

    torch.testing.assert_close(embed(image), expected)


def test_attention_equals_that_of_torch() -> None:
    attention = SelfAttention(12, num_heads=3)
    other = torch.nn.MultiheadAttention(12, 3, batch_first=True)
    other.load_state_dict(
        {
            "in_proj_weight": attention.qkv.weight,
            "in_proj_bias": attention.qkv.bias,
            "out_proj.weight": attention.proj.weight,
            "out_proj.bias": attention.proj.bias,
        }
    )
    tokens = torch.randn(2, 7, 12)

    torch.testing.assert_close(attention(tokens), other(tokens, tokens, tokens, need_weights=False)[0])


def test_normalised_queries_and_keys_have_the_magnitude_of_their_scale() -> None:
    attention = SelfAttention(12, num_heads=3, qk_norm=True)
    with torch.no_grad():
        attention.ln_k.weight.mul_(2)

    q, k, _ = attention.heads(100 * torch.randn(2, 7, 12))

    torch.testing.assert_close(q.square().mean(-1), torch.ones(2, 3, 7))
    torch.testing.assert_close(k.square().mean(-1), 4 * torch.ones(2, 3, 7))


@pytest.mark.parametrize("num_heads", [0, 5])
def test_a_width_that_does_not_divide_into_heads_is_refused(num_heads: int) -> None:
    with pytest.raises(ValueError, match=f"got a width of 12 for {num_heads} attention heads"):
        SelfAttention(12, num_heads=num_heads)


def test_a_modulation_starts_without_effect_and_acts_on_every_token_alike() -> None:
    modulation, tokens, vector = Modulation(4, 2), torch.randn(2, 5, 4), torch.randn(2, 4)

    torch.testing.assert_close(modulate(tokens, *modulation(vector)), tokens, rtol=0, atol=0)
    shift, scale = torch.randn(2, 4), torch.randn(2, 4)
    for token in range(5):
        expected = tokens[:, token] * (1 + scale) + shift
        torch.testing.assert_close(modulate(tokens, shift, scale)[:, token], expected)
