"""The laws that every network of the paper cards obeys, at tiny sizes."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from network_helpers import perturbed, seeded
from torch import Tensor, nn

from ldm.diffusion.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.parameterizations import EDM as EDMTarget
from ldm.diffusion.schedules import EDM as EDMSchedule
from ldm.diffusion.times import LogNormal
from ldm.diffusion.weightings import Unit
from ldm.networks import ADMUNet, DiT, EDM2UNet, EDMUNet, MicroDiT, MMDiT


@dataclass(frozen=True)
class Case:
    """A geometry, and the parts of the conditions that it takes for three samples."""

    network: type[nn.Module]
    geometry: Mapping[str, Any]
    parts: Mapping[str, Tensor]
    first_output: float = 0.0

    def build(self, **changes: Any) -> nn.Module:
        torch.manual_seed(0)
        return self.network(**{"in_channels": 4, "out_channels": 4, **self.geometry, **changes})

    def cond(self, **changes: Tensor) -> Conditioning:
        return Conditioning(**{**self.parts, **changes})


IDS = {"vector": torch.tensor([1, 3, 5])}
TEXT = {"context": seeded(3, 5, 6, seed=1)}
POOLED = {"vector": seeded(3, 7, seed=2)}
DIT = {"patch_size": 2, "width": 16, "depth": 2, "num_heads": 2}
MMDIT = {**DIT, "context_dim": 6, "vector_dim": 7, "max_positions": 8, "base_positions": 4}
MICRO = {"patch_size": 2, "width": 16, "depth": 3, "head_width": 8, "mixer_width": 8, "mixer_depth": 2}
EDM = {"model_channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_resolutions": [2]}
DDPMPP = {**EDM, "embedding": "sinusoidal", "time_channels": 8}
NCSNPP = {**EDM, "embedding": "fourier", "time_channels": 16, "resample_filter": [1, 3, 3, 1], "input_pyramid": True}
ADM = {**EDM, "num_heads": 2, "norm_groups": 4, "use_scale_shift_norm": True, "resblock_updown": True}
EDM2 = {**EDM, "num_head_channels": 4}

CASES = {
    "DiT": Case(DiT, DIT, {}),
    "DiT, classes and variance": Case(DiT, {**DIT, "num_classes": 5, "learned_variance": True}, IDS),
    "DiT, text and vector": Case(DiT, {**DIT, "context_dim": 6, "vector_dim": 7}, {**TEXT, **POOLED}),
    "DiT, patches of 4": Case(DiT, {**DIT, "patch_size": 4}, {}),
    "MMDiT": Case(MMDiT, MMDIT, {**TEXT, **POOLED}),
    "MMDiT, normalised": Case(MMDiT, {**MMDIT, "qk_norm": True}, {**TEXT, **POOLED}),
    "MMDiT, self-attention": Case(MMDiT, {**MMDIT, "qk_norm": True, "self_attention_blocks": 1}, {**TEXT, **POOLED}),
    "MicroDiT": Case(MicroDiT, {**MICRO, "context_dim": 6, "num_experts": 4}, TEXT),
    "DDPM++": Case(EDMUNet, DDPMPP, {}, first_output=1e-4),
    "DDPM++, classes and augmentation": Case(
        EDMUNet,
        {**DDPMPP, "num_classes": 5, "augment_dim": 6},
        {**IDS, "context": seeded(3, 1, 6, seed=3)},
        first_output=1e-4,
    ),
    "NCSN++": Case(EDMUNet, NCSNPP, {}, first_output=1e-4),
    "EDM2": Case(EDM2UNet, EDM2, {}),
    "EDM2, classes": Case(EDM2UNet, {**EDM2, "num_classes": 5}, IDS),
    "ADM": Case(ADMUNet, {**ADM, "out_channels": 8, "num_classes": 6}, IDS),
}
SIZES = [(8, 8), (4, 12), (12, 4)]
EVERY = pytest.mark.parametrize("name", CASES)
TIMES = torch.tensor([0.1, 0.5, 0.9])


@EVERY
@pytest.mark.parametrize("size", SIZES)
def test_the_output_has_the_shape_of_the_sample_and_starts_at_zero(name: str, size: tuple[int, int]) -> None:
    out = CASES[name].build()(seeded(3, 4, *size), TIMES, CASES[name].cond())

    assert out.shape == (3, 8 if getattr(CASES[name].build(), "learned_variance", False) else 4, *size)
    assert out.abs().max() <= CASES[name].first_output


@EVERY
def test_gradient_reaches_every_parameter(name: str) -> None:
    network = perturbed(CASES[name].build())

    network(seeded(3, 4, 8, 8), TIMES, CASES[name].cond()).square().mean().backward()

    assert [key for key, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


@EVERY
def test_recomputed_blocks_give_the_same_gradients_from_fewer_kept_tensors(name: str) -> None:
    kept, recomputed = CASES[name].build(), CASES[name].build(checkpoint_blocks=True)
    recomputed.load_state_dict(perturbed(kept).state_dict())
    sizes: list[int] = []

    for network in (kept, recomputed):
        counted: list[int] = []

        def pack(tensor: Tensor, counted: list[int] = counted) -> Tensor:
            counted.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = network(seeded(3, 4, 8, 8), TIMES, CASES[name].cond())
        out.square().mean().backward()
        sizes.append(sum(counted))

    assert sizes[1] < 0.5 * sizes[0]
    for expected, actual in zip(kept.parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-5, atol=1e-8)


@EVERY
def test_samples_of_a_batch_do_not_mix(name: str) -> None:
    case = CASES[name]
    network = perturbed(case.build()).double().eval()
    cond = Conditioning(
        **{key: part.double() if part.is_floating_point() else part for key, part in case.parts.items()}
    )
    x, t = seeded(3, 4, 8, 8).double(), TIMES.double()

    alone = network(x[1:2], t[1:2], cond[1:2] if case.parts else cond)

    torch.testing.assert_close(alone, network(x, t, cond)[1:2])


@EVERY
def test_time_and_every_condition_change_the_output(name: str) -> None:
    case = CASES[name]
    network = perturbed(case.build(), scale=0.3).eval()
    x = seeded(3, 4, 8, 8)
    out = network(x, TIMES, case.cond())

    changes = {"t": network(x, TIMES + 1, case.cond())}
    for part, value in case.parts.items():
        other = value - 1 if value.dtype == torch.int64 else -value
        changes[part] = network(x, TIMES, case.cond(**{part: other}))

    assert {key for key, changed in changes.items() if (changed - out).abs().amax((1, 2, 3)).min() < 1e-5} == set()


@EVERY
def test_extra_channels_are_concatenated_after_those_of_the_sample(name: str) -> None:
    case = CASES[name]
    network = perturbed(case.build(in_channels=6)).eval()
    x = seeded(3, 6, 8, 8)

    out = network(x[:, :4], TIMES, case.cond(concat=x[:, 4:]))

    torch.testing.assert_close(out, network(x, TIMES, case.cond()))
    with pytest.raises(ValueError, match=r"got 4 channels .* in_channels 6"):
        network(x[:, :4], TIMES, case.cond())


@EVERY
def test_a_network_is_rebuilt_from_its_arguments(name: str) -> None:
    network = perturbed(CASES[name].build()).eval()
    again = type(network)(**network.arguments).eval()
    again.load_state_dict(network.state_dict())
    x = seeded(3, 4, 8, 8)

    expected = network(x, TIMES, CASES[name].cond())
    torch.testing.assert_close(again(x, TIMES, CASES[name].cond()), expected, rtol=0, atol=0)


@EVERY
def test_conditions_that_the_network_was_not_built_for_are_refused(name: str) -> None:
    case = CASES[name]
    network = case.build()
    offered = {"context": seeded(3, 5, 9), "vector": seeded(3, 9)}

    for part, value in offered.items():
        with pytest.raises(ValueError, match="expected"):
            network(seeded(3, 4, 8, 8), TIMES, case.cond(**{part: value}))
    for part in case.parts:
        if name.startswith("DDPM++") and part == "context":
            continue  # without augmentation labels the image counts as not augmented
        missing = {other: value for other, value in case.parts.items() if other != part}
        with pytest.raises(ValueError, match=f"got no {part}"):
            network(seeded(3, 4, 8, 8), TIMES, Conditioning(**missing))


@EVERY
def test_a_size_that_does_not_divide_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"got an input of 8x7, expected multiples of [24]"):
        CASES[name].build()(seeded(3, 4, 8, 7), TIMES, CASES[name].cond())


@EVERY
def test_a_network_says_what_it_divides_sizes_by(name: str) -> None:
    network = CASES[name].build()
    with pytest.raises(ValueError, match=f"expected multiples of {network.downsampling_factor};"):
        network(seeded(3, 4, 8, 7), TIMES, CASES[name].cond())


@EVERY
def test_bfloat16_autocast_stays_close_to_float32(name: str) -> None:
    network = perturbed(CASES[name].build(), scale=0.1).eval()
    x = seeded(3, 4, 8, 8)
    expected = network(x, TIMES, CASES[name].cond())

    with torch.autocast("cpu", torch.bfloat16):
        out = network(x, TIMES, CASES[name].cond())

    assert (out.float() - expected).abs().max() < 0.04 * expected.abs().max()


@EVERY
def test_half_precision_weights_take_half_precision_samples(name: str) -> None:
    network = perturbed(CASES[name].build(), scale=0.1).eval()
    x, cond = seeded(3, 4, 8, 8), CASES[name].cond()
    # Weights and frequencies rounded, and calculated with in float32.
    expected = network.bfloat16().float()(x, TIMES, cond)

    halves = {key: part.bfloat16() if part.is_floating_point() else part for key, part in cond.parts().items()}
    out = network.bfloat16()(x.bfloat16(), TIMES, Conditioning(**halves))

    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).abs().max() < 0.04 * expected.abs().max()


LEARNING = ["DiT, classes and variance", "MMDiT", "MicroDiT", "NCSN++", "EDM2, classes", "ADM"]


@pytest.mark.parametrize("name", LEARNING)
def test_a_denoiser_learns_one_batch(name: str) -> None:
    case = CASES[name]
    schedule = EDMSchedule(sigma_data=1.0)
    network = case.build()
    denoiser = Denoiser(
        network,
        schedule=schedule,
        parameterization=EDMTarget(),
        weighting=Unit(),
        times=LogNormal(p_mean=-0.4, p_std=1.0),
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    x_0, eps, t = seeded(3, 4, 8, 8), seeded(3, 4, 8, 8, seed=1), torch.tensor([0.2, 0.7, 2.0])
    losses = []

    for _ in range(40):
        loss = denoiser.loss(x_0, eps, t, case.cond()).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if isinstance(network, EDM2UNet):
            network.after_optimizer_step()

    assert losses[0] == pytest.approx(1, rel=0.3)  # the target has unit variance, and the output starts at zero
    assert losses[-1] < 0.6 * losses[0]


def test_every_part_of_the_conditions_is_tried() -> None:
    tried = {part for case in CASES.values() for part in case.parts} | {"concat", "mask"}
    assert tried == {field.name for field in fields(Conditioning)}


MASKED = ["DiT, text and vector", "MMDiT", "MMDiT, normalised"]


@pytest.mark.parametrize("name", MASKED)
def test_a_masked_token_does_not_reach_the_output(name: str) -> None:
    case = CASES[name]
    network = perturbed(case.build(), scale=0.3).double()
    context, vector = case.parts["context"].double(), case.parts["vector"].double()
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] + [False] * 4])
    other = torch.where(mask[..., None], context, torch.full_like(context, 100.0))
    x, t = seeded(3, 4, 8, 8).double(), TIMES.double()

    masked = network(x, t, Conditioning(context=context, mask=mask, vector=vector))

    torch.testing.assert_close(network(x, t, Conditioning(context=other, mask=mask, vector=vector)), masked)
    shorter = Conditioning(context=context[1:2, :3], vector=vector[1:2])
    torch.testing.assert_close(network(x[1:2], t[1:2], shorter), masked[1:2])


NULLED = ["DiT, classes and variance", "DDPM++, classes and augmentation", "EDM2, classes"]


@pytest.mark.parametrize("name", NULLED)
def test_the_id_after_the_last_class_is_no_class_and_the_one_after_it_is_refused(name: str) -> None:
    case = CASES[name]
    network = perturbed(case.build(), scale=0.3).eval()
    x = seeded(1, 4, 8, 8).expand(6, -1, -1, -1)
    t = TIMES[:1].expand(6)

    out = network(x, t, Conditioning(vector=torch.arange(6)))

    distances = torch.cdist(out.flatten(1), out.flatten(1)) + torch.eye(6)
    assert distances.min() > 1e-4
    with pytest.raises((IndexError, RuntimeError)):
        network(x, t, Conditioning(vector=torch.arange(1, 7)))
