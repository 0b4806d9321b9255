import time

import pytest
import pytorch_lightning as pl
import torch
from torch.testing import assert_close
from torch.utils.data import DataLoader

from ldm.training.callbacks import Throughput
from ldm.training.callbacks.cadence import outside_training
from ldm.training.callbacks.throughput import num_images

# Multiply-adds of the tiny module's step: one 3x3 convolution, 3 to 3 channels, 4 images of 8x8, forward and the
# gradient of its weights; its input needs none.
TINY_FLOPS = 2 * 2 * 4 * 8 * 8 * 3 * 3 * 9


class Nap(pl.Callback):
    """Sleeps after every batch, outside training or not."""

    def __init__(self, seconds: float, *, outside: bool) -> None:
        self.seconds = seconds
        self.outside = outside

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if not self.outside:
            time.sleep(self.seconds)
            return
        with outside_training(trainer):
            time.sleep(self.seconds)


def test_images_per_second_times_step_seconds_is_the_batch_size(tiny, data, fit, logged) -> None:
    fit(tiny, data, [Throughput()], max_steps=6)
    rates, seconds = logged("throughput/images_per_second"), logged("throughput/step_seconds")
    assert list(rates) == [1, 3, 5]
    assert [rates[step] * seconds[step] for step in rates] == pytest.approx([4.0] * 3)


def test_a_slow_loader_shows_as_data_wait(tiny, data, fit, logged) -> None:
    class Slow(torch.utils.data.Dataset):
        def __len__(self):
            return 100

        def __getitem__(self, index):
            time.sleep(0.05)
            return data._batch(range(4))

    data.train_dataloader = lambda: DataLoader(Slow(), batch_size=None)
    fit(tiny, data, [Throughput()], max_steps=4)
    assert logged("throughput/data_wait_share")[3] > 0.6


def test_sampling_is_left_out_of_step_time_and_data_wait(tiny, data, fit, logged) -> None:
    fit(tiny, data, [Throughput(), Nap(0.2, outside=True)], max_steps=4)
    assert logged("throughput/step_seconds")[3] < 0.1


def test_other_time_between_steps_is_not_left_out(tiny, data, fit, logged) -> None:
    fit(tiny, data, [Throughput(), Nap(0.05, outside=False)], max_steps=4)
    assert logged("throughput/step_seconds")[3] > 0.05


def test_utilisation_is_flops_of_a_step_over_the_peak(tiny, data, fit, logged) -> None:
    callback = Throughput(device_peak_flops=1e9)
    fit(tiny, data, [callback], max_steps=6)
    assert callback._flops_per_batch == TINY_FLOPS
    seconds, share = logged("throughput/step_seconds"), logged("throughput/model_flops_utilisation")
    assert share[5] == pytest.approx(TINY_FLOPS / seconds[5] / 1e9)


def test_without_a_known_peak_nothing_is_counted_or_logged(tiny, data, fit, tmp_path) -> None:
    callback = Throughput()
    fit(tiny, data, [callback])
    assert callback._flops_per_batch is None
    assert "utilisation" not in (tmp_path / "metrics.csv").read_text()


def test_counting_flops_does_not_change_training(tiny, data, fit) -> None:
    start = {name: value.clone() for name, value in tiny.state_dict().items()}
    fit(tiny, data, [])
    expected = {name: value.clone() for name, value in tiny.state_dict().items()}
    tiny.load_state_dict(start)
    fit(tiny, data, [Throughput(device_peak_flops=1e9)])
    assert_close(tiny.state_dict(), expected, rtol=0, atol=0)


def test_an_error_in_the_counted_step_leaves_no_counter_behind(tiny, data, fit) -> None:
    def training_step(batch, batch_idx):
        raise RuntimeError("broken step")

    tiny.training_step = training_step
    callback = Throughput(device_peak_flops=1e9)
    with pytest.raises(RuntimeError, match="broken step"):
        fit(tiny, data, [callback])
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_a_batch_counts_its_first_tensor() -> None:
    assert num_images({"caption": ["a", "b"], "moments": torch.zeros(5, 8, 2, 2)}) == 5
