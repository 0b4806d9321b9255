"""Compiled blocks, float8 products and moments in 8 bits train the same model, under the same names."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch._dynamo.utils as dynamo
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from ldm.data import ShardDataModule
from ldm.diffusion import Conditioning
from ldm.networks import DiT, MicroDiT
from ldm.training import LatentDiffusionModule
from ldm.training.checkpoint_io import AtomicCheckpointIO
from ldm.training.compilation import Compilation, is_float8, use_float8
from ldm.training.sharding import blocks_of

MakeModule = Callable[..., LatentDiffusionModule]
Fit = Callable[..., tuple[LatentDiffusionModule, pl.Trainer]]
# Traces and takes derivatives as the default backend does, without a compiler of C++.
TRACED = partial(Compilation, backend="aot_eager", dynamic=False)


@pytest.fixture
def fit(
    make_latent_diffusion: MakeModule,
    make_data: Callable[..., ShardDataModule],
    make_trainer: Callable[..., pl.Trainer],
) -> Fit:
    data = make_data()

    def run(*, checkpoint: Path | None = None, max_steps: int = 4, **options: Any) -> Any:
        module = make_latent_diffusion(**options)
        trainer = make_trainer(
            max_steps=max_steps, val_check_interval=2, check_val_every_n_epoch=None, plugins=[AtomicCheckpointIO()]
        )
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        return module, trainer

    return run


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("what", ["blocks", "network"])
def test_a_compiled_network_trains_validates_and_resumes_as_it_would_uncompiled(
    what: str, fit: Fit, tmp_path: Path
) -> None:
    # Not Adam: it turns rounding errors of gradients that are zero, as those of key biases are, into whole steps.
    fit = partial(fit, optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    plain, _ = fit()
    half, trainer = fit(compile=TRACED(what=what), max_steps=2)
    assert set(half.state_dict()) == set(plain.state_dict())
    trainer.save_checkpoint(tmp_path / "step.ckpt")
    compiled, _ = fit(compile=TRACED(what=what), checkpoint=tmp_path / "step.ckpt")
    assert_close(dict(compiled.state_dict()), dict(plain.state_dict()), rtol=1e-4, atol=1e-6)
    network = compiled.trained.denoiser.network
    parts = [network] if what == "network" else list(blocks_of(network))
    assert all(part._compiled_call_impl is not None for part in parts)
    assert compiled.sample(["red"], seeds=[0])[0].size == (16, 16)


@pytest.mark.compile
@pytest.mark.slow
def test_blocks_that_are_all_different_are_all_compiled() -> None:
    """MicroDiT's grow wider from one to the next; torch gives up on the ninth graph of one function by itself."""
    torch.manual_seed(0)
    geometry = {"width": 64, "depth": 12, "head_width": 2, "mixer_width": 32, "mixer_depth": 2, "context_dim": 8}
    network = MicroDiT(4, 4, patch_size=2, **geometry, drop_patches=0.5)
    x, t, cond = torch.randn(2, 4, 8, 8), torch.rand(2), Conditioning(context=torch.randn(2, 5, 8))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)

    def output() -> torch.Tensor:
        torch.manual_seed(1)
        return network(x, t, cond)

    expected = output()
    torch._dynamo.reset()
    dynamo.counters.clear()
    TRACED().apply(network)

    assert_close(output(), expected)
    assert dynamo.counters["stats"]["unique_graphs"] > 8
    assert not dynamo.counters["unimplemented"]


def test_blocks_are_those_of_the_outermost_lists() -> None:
    dit = DiT(4, 4, patch_size=2, width=16, depth=3, num_heads=2)
    assert list(blocks_of(dit)) == list(dit.blocks)
    with pytest.raises(ValueError, match="has no list of blocks; choose compile=network"):
        Compilation().apply(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"compile\.what: got 'half', expected 'blocks' or 'network'"):
        Compilation(what="half")


def test_float8_replaces_what_fits_and_keeps_parameters_and_names() -> None:
    pytest.importorskip("torchao")
    network = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 7))
    before = dict(network.named_parameters())
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    exact = network(x)
    assert use_float8(network, "emulated") == 1
    assert [is_float8(layer) for layer in network] == [True, False]
    assert {name: id(p) for name, p in network.named_parameters()} == {name: id(p) for name, p in before.items()}
    error = (network(x) - exact).norm() / exact.norm()
    assert 1e-3 < error < 0.1, "3 bits of mantissa"


def test_float8_trains_and_its_average_does_without(fit: Fit) -> None:
    pytest.importorskip("torchao")
    from tiny_models import tiny_denoiser

    denoiser = tiny_denoiser()
    denoiser.network.time_embed = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 32))
    module, _ = fit(denoiser=denoiser, float8="emulated", max_steps=2)
    assert any(is_float8(part) for part in module.trained.modules())
    assert not any(is_float8(part) for part in module.ema.modules())
    assert set(module.ema.module.state_dict()) == set(module.trained.state_dict())


@pytest.mark.parametrize(
    ("kind", "words"),
    [("half", "expected one of device, emulated"), ("device", "expected a GPU of compute capability 8.9")],
)
def test_float8_that_cannot_be_is_refused(kind: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=words):
        use_float8(nn.Linear(16, 16), kind)


def test_moments_in_8_bits_train_and_resume(fit: Fit, tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    optimizer = partial(bitsandbytes.optim.AdamW8bit, lr=1e-3, min_8bit_size=16)
    straight, trainer = fit(optimizer=optimizer)
    kept = next(iter(trainer.optimizers[0].state.values()))
    assert kept["state1"].dtype == torch.uint8
    _, half = fit(optimizer=optimizer, max_steps=2)
    half.save_checkpoint(tmp_path / "step.ckpt")
    resumed, _ = fit(optimizer=optimizer, checkpoint=tmp_path / "step.ckpt")
    assert_close(dict(resumed.state_dict()), dict(straight.state_dict()), rtol=0, atol=0)
    exact, _ = fit(optimizer=partial(torch.optim.AdamW, lr=1e-3))
    assert_close(dict(straight.state_dict()), dict(exact.state_dict()), rtol=0.05, atol=5e-3)


@pytest.mark.parametrize("options", [{"ema_offload": True}, {"ema_offload": True, "ema_every_n_steps": 2}])
def test_an_offloaded_average_is_the_same(options: dict[str, Any], fit: Fit, make_latent_diffusion: MakeModule) -> None:
    plain, _ = fit(ema_every_n_steps=options.get("ema_every_n_steps", 1))
    offloaded, _ = fit(**options)
    assert_close(dict(offloaded.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)
    assert offloaded.sample(["red"], seeds=[3])[0].tobytes() == plain.sample(["red"], seeds=[3])[0].tobytes()


def test_an_offloaded_average_stays_away_from_the_device_except_to_be_used(
    make_latent_diffusion: MakeModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make_latent_diffusion(ema_offload=True)
    module.double()  # goes the way that a move to a device goes
    assert {p.dtype for p in module.trained.parameters()} == {torch.float64}
    assert {p.dtype for p in module.ema.parameters()} == {torch.float32}
    moves: list[torch.device] = []
    monkeypatch.setattr(module.ema.module, "to", moves.append)
    device = torch.device("cuda:1")
    with module.ema.on(device) as average, module.ema.on(device) as again:
        assert again is average
        assert moves == [device]
    assert moves == [device, torch.device("cpu")]


def test_fewer_updates_count_for_more_steps(make_latent_diffusion: MakeModule) -> None:
    module = make_latent_diffusion(ema_every_n_steps=3, ema_decay=0.9)
    start = {name: p.clone() for name, p in module.ema.module.named_parameters()}
    for p in module.trained.parameters():
        p.data.add_(1)
    for step in (998, 999, 1000):  # the 999th, 1000th and 1001st update
        module.ema.update(module.trained, num_updates=step)
    for name, average in module.ema.module.named_parameters():
        assert_close(average - start[name], torch.full_like(average, 1 - 0.9**3), rtol=1e-4, atol=1e-5)


def test_ddp_takes_a_module_whose_offloaded_average_lies_elsewhere(
    make_latent_diffusion: MakeModule, tmp_path: Path
) -> None:
    """Of the kinds of devices there are two here as well: "meta" stands in for the host beside a GPU."""
    module = make_latent_diffusion(ema_offload=True)
    module.ema.module.to_empty(device="meta")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert DistributedDataParallel(module).device_type == "cpu"
        del module._ddp_params_and_buffers_to_ignore
        with pytest.raises(ValueError, match="same type of devices"):
            DistributedDataParallel(module)
    finally:
        dist.destroy_process_group()
