"""Counting without computing: arithmetic as published, memory as measured on real tensors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.cli.plan_count import Line, Meter, forward_amount, step_amounts
from ldm.cli.plan_published import network_work
from ldm.diffusion.conditioning import Conditioning
from ldm.networks import MicroDiT, UNet

TINY: dict[str, Any] = {
    "model_channels": 32,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "attention_resolutions": [1, 2],
    "num_heads": 2,
    "context_dim": 16,
}


def tiny(device: str, **settings: Any) -> tuple[nn.Module, Callable[[int], Callable[[], Tensor]]]:
    """A small U-Net and what its loss on a batch of a size is."""
    with torch.device(device):
        network = UNet(4, 4, **{**TINY, **settings})

    def loss(size: int) -> Callable[[], Tensor]:
        with torch.device(device):
            x, t, context = torch.zeros(size, 4, 16, 16), torch.zeros(size), torch.zeros(size, 7, 16)
        return lambda: network(x, t, Conditioning(context=context)).float().square().mean()

    return network, loss


def saved_bytes(network: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Bytes that autograd really keeps for the backward pass, parameters left out, and of inputs none."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = loss()
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    found = sum(size for place, size in kept.items() if place not in own)
    del result
    return found


@pytest.mark.parametrize(
    ("name", "side", "forward", "step", "millions"),
    [
        ("sd1", 64, 0.8033, 2.4068, 859.52),
        ("sd2", 32, 0.1811, 0.5393, 865.91),
        ("dit_xl_2", 32, 0.2373, 0.712, 674.83),
        ("micro_dit_xl_2", 32, 0.2381, 0.7142, 1165.44),
    ],
)
def test_tera_flops_and_parameters_of_an_image_are_the_known_ones(
    name: str, side: int, forward: float, step: float, millions: float
) -> None:
    work = network_work(name, side)
    assert work.forward / 1e12 == pytest.approx(forward, rel=1e-3)
    assert work.plain / 1e12 == pytest.approx(step, rel=1e-3)
    assert work.counts["network"] / 1e6 == pytest.approx(millions, abs=0.01)


def test_what_is_not_computed_of_dropped_patches_is_not_counted() -> None:
    """As counted in the published network, less the products with one-hot matrices by which it picks tokens."""
    geometry = {"width": 1024, "depth": 28, "head_width": 64, "mixer_width": 768, "mixer_depth": 6, "context_dim": 1024}
    with torch.device("meta"):
        network = MicroDiT(4, 4, patch_size=2, drop_patches=0.75, **geometry)
        x, t, cond = torch.zeros(1, 4, 32, 32), torch.zeros(1), Conditioning(context=torch.zeros(1, 77, 1024))
        training = forward_amount(lambda: network.train()(x, t, cond), dtype=None)
        sampling = forward_amount(lambda: network.eval()(x, t, cond), dtype=None)

    assert (training.total, sampling.total) == (94_100_426_752, 238_137_020_416)


def test_activations_on_meta_are_those_that_autograd_keeps_of_real_tensors() -> None:
    network, loss = tiny("meta")
    counted = {size: step_amounts(loss(size), dtype=None, parameters=[*network.parameters()])[0] for size in (2, 4)}
    real, real_loss = tiny("cpu")
    measured = {size: saved_bytes(real, real_loss(size)) for size in (2, 4)}

    # Per sample, so that what does not grow with the batch (the loss, embeddings of constants) is no matter.
    assert counted[4].kept - counted[2].kept == pytest.approx(measured[4] - measured[2], rel=0.03)


def test_precision_keeps_what_autocast_of_cuda_keeps() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from ldm.cli.plan_count import Precision

    network, loss = tiny("meta")
    counted = [step_amounts(loss(n), dtype=torch.bfloat16, parameters=[*network.parameters()])[0].kept for n in (2, 4)]
    kept = []
    # Tensors that only say that they are on a GPU go through torch's own autocast.
    with FakeTensorMode(), Precision(None):
        _, fake_loss = tiny("cuda")
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        for size in (2, 4):
            torch.set_autocast_enabled("cuda", True)
            with Meter() as meter:
                result = fake_loss(size)()
                kept.append(meter.amount().kept)
            del result
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()

    assert counted[1] - counted[0] == pytest.approx(kept[1] - kept[0], rel=0.05)


def test_recomputed_blocks_keep_less_and_compute_the_forward_pass_again() -> None:
    network, loss = tiny("meta")
    plain = step_amounts(loss(4), dtype=torch.bfloat16, parameters=[*network.parameters()])
    network, loss = tiny("meta", checkpoint_blocks=True)
    again = step_amounts(loss(4), dtype=torch.bfloat16, parameters=[*network.parameters()])

    assert again[0].kept < 0.5 * plain[0].kept
    assert plain[1].total < again[1].total < plain[1].total + plain[0].total


def test_a_product_counts_two_operations_for_each_multiplication_and_its_memory_exactly() -> None:
    x, w = torch.empty(8, 16, device="meta"), torch.empty(16, 32, device="meta")
    amount = forward_amount(lambda: torch.relu(x @ w), dtype=None)

    assert amount.flops == {"linear": 2 * 8 * 16 * 32}
    assert amount.peak == 2 * 4 * 8 * 32
    assert amount.kept == 4 * 8 * 32
    assert amount.traffic == 2 * 4 * 8 * 32


def test_attention_keeps_no_scores() -> None:
    q = torch.empty(2, 4, 64, 8, device="meta")
    amount = forward_amount(lambda: F.scaled_dot_product_attention(q, q, q), dtype=None)
    assert amount.flops == {"attention": 2 * 2 * 2 * 4 * 64 * 64 * 8}
    assert amount.peak <= 4 * (q.numel() + 2 * 4 * 64)


def test_a_line_goes_through_both_amounts() -> None:
    _, loss = tiny("meta")
    line = Line.through(lambda size: forward_amount(loss(size), dtype=None), sizes=(2, 4))
    assert line.at(6).total == pytest.approx(forward_amount(loss(6), dtype=None).total)
    assert line.at(6).kernels == pytest.approx(forward_amount(loss(6), dtype=None).kernels)
