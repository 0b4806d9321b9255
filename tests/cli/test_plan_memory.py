"""Memory by strategy, to the byte, and seconds that move the right way."""

from dataclasses import replace

import pytest

from ldm.cli.plan_count import Amount, Line
from ldm.cli.plan_hardware import Hardware, Interconnect
from ldm.cli.plan_memory import Settings, Strategy, fitting_batch, host_bytes, memory, optimizer_bytes
from ldm.cli.plan_time import STACKS, Place, Run, Seconds, seconds
from ldm.cli.plan_work import Work

N = 10**9
EACH = Amount({"linear": 1e12}, traffic=1e9, peak=2**30)
WORK = Work(
    step=Line(Amount(kernels=1000.0), EACH), plain=1e12, forward=1e12 / 3, parts={}, trained=[N], frozen=10**8,
    averaged=True, largest_block=10**7, counts={"network": N}, sample_bytes=1e5, reads="moments",
)  # fmt: skip
ADAMW = Settings(optimizer="AdamW", momentum=False, ema_offload=False, half=True, gpus=8)
H100 = Hardware(
    title="H100", bf16=989, fp16=989, tf32=494, fp32=67, fp8=1979, achieved=0.8, memory_gib=79.1, bandwidth_tb=3.35,
    nvlink_gb=450, network_gb=50, gpus_per_node=8, cores_per_node=112,
)  # fmt: skip


def held(strategy: Strategy, settings: Settings = ADAMW) -> dict[str, float]:
    found = memory(WORK, settings, strategy, micro_batch=4)
    return {name: size for name, size in vars(found).items() if name not in ("activations", "context")}


@pytest.mark.parametrize(
    ("optimizer", "momentum", "expected"),
    [("AdamW", False, 8 * N), ("Adam", False, 8 * N), ("SGD", False, 0), ("SGD", True, 4 * N), ("Lion", False, 4 * N)],
)
def test_optimizer_state_is_exact(optimizer: str, momentum: bool, expected: int) -> None:
    assert optimizer_bytes([N], replace(ADAMW, optimizer=optimizer, momentum=momentum)) == expected


def test_eight_bit_moments_take_a_byte_and_their_blocks_a_float_and_small_tensors_stay() -> None:
    settings = replace(ADAMW, optimizer="AdamW8bit")
    assert optimizer_bytes([256 * 100, 4095], settings) == 2 * (25600 + 4 * 100) + 8 * 4095


def test_ddp_holds_everything_on_each_device() -> None:
    frozen = 4 * 10**8
    assert held(Strategy()) == {
        "weights": frozen + 4 * N, "gradients": 4 * N, "optimizer": 8 * N, "average": 4 * N, "gathered": 0,
    }  # fmt: skip


def test_fsdp2_spreads_what_is_trained_and_gathers_two_blocks() -> None:
    assert held(Strategy(name="fsdp2")) == {
        "weights": 4 * 10**8 + N / 2, "gradients": N / 2, "optimizer": N, "average": N / 2, "gathered": 1.2e8,
    }  # fmt: skip


def test_deepspeed_keeps_true_weights_beside_the_moments_and_spreads_gradients_from_its_second_stage() -> None:
    first, second = (held(Strategy(name="deepspeed", stage=stage)) for stage in (1, 2))
    assert first["optimizer"] == second["optimizer"] == 12 * N / 8
    assert (first["gradients"], second["gradients"]) == (2 * N, 2 * N / 8)


def test_offloading_moves_bytes_to_the_host() -> None:
    settings = replace(ADAMW, ema_offload=True)
    assert held(Strategy(), settings)["average"] == 0
    assert host_bytes(WORK, settings, Strategy()) == 4 * (N + 10**8)


def test_the_largest_divisor_that_fits_is_taken() -> None:
    room = memory(WORK, ADAMW, Strategy(), micro_batch=9).total / 0.95
    assert fitting_batch(WORK, ADAMW, Strategy(), per_device=24, room=room) == 8


def taken(gpus: int, *, batch: int = 4, strategy: Strategy | None = None, wire: float | None = None) -> Seconds:
    between = None if wire is None else Interconnect(title="wire", network_gb=wire, latency_us=5)
    settings = replace(ADAMW, gpus=gpus)
    run = Run(
        precision="bf16-mixed", micro_batch=batch, accumulate=1, settings=settings, strategy=strategy or Strategy(),
        stack=STACKS["eager"], cores=8,
    )  # fmt: skip
    return seconds(WORK, Place(hardware=H100, gpus=gpus, interconnect=between), run)


def test_arithmetic_follows_from_the_peak() -> None:
    expected = 4 * 1e12 / (989e12 * 0.8 * STACKS["eager"].arithmetic)
    assert taken(1).arithmetic == pytest.approx(expected)
    assert taken(1).communication == 0


@pytest.mark.parametrize("strategy", [Strategy(), Strategy(name="fsdp2"), Strategy(name="deepspeed", stage=2)])
def test_more_devices_wait_longer_for_each_other_and_more_nodes_are_faster_all_the_same(strategy: Strategy) -> None:
    found = {gpus: taken(gpus, strategy=strategy, wire=5) for gpus in (1, 8, 16, 64, 512)}
    waits = [one.communication for one in found.values()]
    assert waits == sorted(waits)
    rates = [gpus / one.step for gpus, one in found.items() if gpus > 8]
    assert rates == sorted(rates)


def test_a_larger_batch_takes_longer_and_is_faster_for_each_image() -> None:
    few, many = taken(8, batch=2), taken(8, batch=32)
    assert few.step < many.step
    assert few.step / 2 > many.step / 32


def test_a_thin_wire_becomes_the_bottleneck() -> None:
    assert taken(16, wire=0.5).bottleneck == "communication"
    assert taken(16, wire=50, batch=32).bottleneck == "arithmetic"
