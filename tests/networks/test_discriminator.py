import pytest
import torch

from ldm.networks import PatchDiscriminator


def test_the_published_geometry_has_its_published_keys() -> None:
    shapes = {name: tuple(value.shape) for name, value in PatchDiscriminator().named_parameters()}

    assert shapes == {
        "main.0.weight": (64, 3, 4, 4),
        "main.0.bias": (64,),
        "main.2.weight": (128, 64, 4, 4),
        "main.3.weight": (128,),
        "main.3.bias": (128,),
        "main.5.weight": (256, 128, 4, 4),
        "main.6.weight": (256,),
        "main.6.bias": (256,),
        "main.8.weight": (512, 256, 4, 4),
        "main.9.weight": (512,),
        "main.9.bias": (512,),
        "main.11.weight": (1, 512, 4, 4),
        "main.11.bias": (1,),
    }


def test_a_logit_sees_a_patch_of_seventy_pixels() -> None:
    discriminator = PatchDiscriminator(base_channels=4, norm="none").eval()
    images = torch.zeros(1, 3, 256, 256, requires_grad=True)

    logits = discriminator(images)
    logits[0, 0, 15, 15].backward()

    seen = images.grad.abs().sum(dim=(0, 1)).nonzero()
    assert logits.shape == (1, 1, 30, 30)
    assert (seen.amax(dim=0) - seen.amin(dim=0) + 1).tolist() == [70, 70]


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_gradient_reaches_every_parameter(norm: str) -> None:
    discriminator = PatchDiscriminator(base_channels=32, num_layers=2, norm=norm)

    discriminator(torch.randn(2, 3, 32, 32)).square().mean().backward()

    assert [name for name, p in discriminator.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_weights_start_with_a_deviation_of_two_hundredths() -> None:
    weight = PatchDiscriminator().main[8].weight

    torch.testing.assert_close(weight.std(), torch.tensor(0.02), rtol=0.01, atol=0)


def test_an_unknown_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="got norm 'layer', expected 'batch', 'group' or 'none'"):
        PatchDiscriminator(norm="layer")


def test_a_discriminator_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="got num_layers 0, expected at least 1"):
        PatchDiscriminator(num_layers=0)
