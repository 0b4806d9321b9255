import io
import re

import pytest
import torch

from ldm.training.callbacks import Progress
from ldm.training.callbacks.progress import BarDisplay, LineDisplay, Status, clock, make_display


class Terminal(io.StringIO):
    """Text that says it is a terminal."""

    def isatty(self) -> bool:
        return True


STATUS = Status(step=20, total=80, metrics={"loss": 0.12345}, images_per_second=1234.6, seconds_left=75.0)


def test_a_line_tells_step_loss_rate_and_time_left() -> None:
    stream = io.StringIO()
    LineDisplay(stream, refresh_seconds=10).show(STATUS)
    assert stream.getvalue() == "step 20/80  loss 0.1235  1,235 images/s  1:15 left\n"


def test_a_run_without_end_shows_no_total_and_no_time_left() -> None:
    stream = io.StringIO()
    LineDisplay(stream, refresh_seconds=10).show(Status(step=20, total=None, metrics={}))
    assert stream.getvalue() == "step 20\n"


def test_a_terminal_gets_a_bar_with_the_same_words() -> None:
    stream = Terminal()
    display = make_display(stream, every_n_seconds=10)
    assert isinstance(display, BarDisplay)
    display.show(STATUS)
    display.stop()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    for words in ("20/80", "loss 0.1235", "1,235 images/s", "1:15 left"):
        assert words in text


def test_anything_else_gets_lines() -> None:
    assert isinstance(make_display(io.StringIO(), every_n_seconds=10), LineDisplay)


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (754, "12:34"), (3661, "1:01:01")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_a_run_logs_its_first_and_its_last_step(tiny, data, fit, capsys) -> None:
    fit(tiny, data, [Progress(every_n_seconds=1000)], max_steps=6, enable_progress_bar=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["1/6", "6/6"]
    assert all(re.search(r"loss \S+  [\d,]+ images/s  \d+:\d\d left$", line) for line in lines)


def test_a_run_shows_every_step_where_the_interval_is_nothing(tiny, data, fit, capsys) -> None:
    fit(tiny, data, [Progress(every_n_seconds=0)], max_steps=4, enable_progress_bar=True)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["1/4", "2/4", "3/4", "4/4"]


def test_values_are_read_off_the_device_only_when_shown(tiny, data, fit, monkeypatch) -> None:
    reads = []
    item = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda self: reads.append(1) or item(self))
    settings = {"max_steps": 40, "enable_progress_bar": True, "log_every_n_steps": 1000, "logger": False}
    fit(tiny, data, [Progress(every_n_seconds=1000)], **settings)
    assert len(reads) < 10


def test_named_metrics_that_are_logged_are_shown_and_others_left_out(tiny, data, fit, capsys) -> None:
    progress = Progress(metrics=["train/loss", "val/loss", "val/fid"], every_n_seconds=0)
    validation = {"limit_val_batches": 1.0, "val_check_interval": 2}
    fit(tiny, data, [progress], max_steps=3, enable_progress_bar=True, **validation)
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.match(r"step 3/3  loss \S+  val/loss \S+  [\d,]+ images/s", last)


def test_a_disabled_bar_shows_nothing(tiny, data, fit, capsys) -> None:
    progress = Progress(every_n_seconds=0)
    progress.setup = lambda *arguments, **named: progress.disable()
    fit(tiny, data, [progress], max_steps=2, enable_progress_bar=True)
    assert "step" not in capsys.readouterr().out
