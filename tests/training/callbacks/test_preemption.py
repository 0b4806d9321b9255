"""Signals: what the handler does, and how often ranks ask each other."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from ldm.training.callbacks.preemption import SAME_SIGNAL_SECONDS, StopOnSignal, steps_between


@pytest.fixture
def stop() -> Iterator[StopOnSignal]:
    with StopOnSignal() as stop:
        yield stop


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_the_handler_notes_the_signal_and_no_more(name: str, stop: StopOnSignal) -> None:
    os.kill(os.getpid(), signal.Signals[name])
    assert stop.asked == signal.Signals[name]


def test_the_same_signal_within_a_moment_is_the_same(stop: StopOnSignal) -> None:
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.asked == signal.SIGTERM


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_the_same_signal_later_or_ctrl_c_ends_at_once(second: signal.Signals, stop: StopOnSignal) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    stop._asked_at -= SAME_SIGNAL_SECONDS
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), second)


def test_the_end_of_the_time_does_not_break_off_the_save_that_its_announcement_began(stop: StopOnSignal) -> None:
    os.kill(os.getpid(), signal.SIGUSR1)
    stop._asked_at -= SAME_SIGNAL_SECONDS
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.asked == signal.SIGUSR1


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with StopOnSignal():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


def test_outside_the_main_thread_nothing_is_handled() -> None:
    errors: list[BaseException] = []

    def use() -> None:
        try:
            with StopOnSignal():
                pass
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert errors == []


@pytest.mark.parametrize(("seconds", "steps"), [(0.0, 10), (0.1, 10), (0.5, 4), (1.5, 1), (600.0, 1)])
def test_ranks_ask_each_other_every_ten_steps_or_two_seconds(seconds: float, steps: int) -> None:
    assert steps_between(seconds) == steps
