import pytest
import pytorch_lightning as pl
import torch
from torch.testing import assert_close

from ldm.training.callbacks import GradientNorm
from ldm.training.callbacks.left_out import global_norm


def test_the_norm_is_that_of_all_entries_together() -> None:
    tensors = [torch.randn(3, 4), torch.randn(5), torch.randn(2, 2, 2)]
    assert_close(global_norm(tensors), torch.cat([t.flatten() for t in tensors]).norm())


def test_the_norm_is_taken_before_clipping(tiny, data, fit, logged) -> None:
    images = next(iter(data.train_dataloader()))["image"]
    (tiny.network(images) - images).square().mean().backward()
    expected = global_norm([p.grad for p in tiny.parameters()]).item()
    tiny.zero_grad()
    fit(tiny, data, [GradientNorm()], max_steps=1, log_every_n_steps=1, gradient_clip_val=expected / 100)
    assert logged("train/gradient_norm") == {0: pytest.approx(expected, rel=1e-5)}


def test_only_logged_steps_are_computed(tiny, data, fit, logged) -> None:
    fit(tiny, data, [GradientNorm()], max_steps=6, log_every_n_steps=3)
    assert list(logged("train/gradient_norm")) == [2, 5]


def test_each_of_two_optimizers_gets_its_own_norm(tiny, data, fit, logged) -> None:
    tiny.automatic_optimization = False
    tiny.configure_optimizers = lambda: [torch.optim.SGD([p], lr=0.1) for p in tiny.parameters()]

    def training_step(batch, batch_idx):
        optimizers = tiny.optimizers()
        tiny.manual_backward(tiny.network(batch["image"]).square().mean())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    tiny.training_step = training_step
    fit(tiny, data, [GradientNorm()], max_steps=4, log_every_n_steps=1)
    assert all(value > 0 for i in (0, 1) for value in logged(f"train/gradient_norm_{i}").values())


@pytest.mark.parametrize("fused", [False, True])
def test_in_float16_the_norm_is_without_the_scale_of_the_loss(tiny, data, fit, logged, fused) -> None:
    found = []
    for scale in (1.0, 1024.0):
        tiny.configure_optimizers = lambda: torch.optim.Adam(tiny.parameters(), lr=0.0, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        precision = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)
        fit(tiny, data, [GradientNorm()], max_steps=1, log_every_n_steps=1, plugins=[precision])
        found.append(logged("train/gradient_norm")[0])
    assert found[1] == pytest.approx(found[0], rel=1e-2)
