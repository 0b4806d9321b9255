import pytest

from ldm.training.callbacks.cadence import Cadence


def steps_due(cadence: Cadence, steps: range | list[int]) -> list[int]:
    return [step for step in steps if cadence.due(step)]


def test_due_once_at_each_multiple() -> None:
    assert steps_due(Cadence(3), [0, 1, 2, 3, 3, 4, 5, 6, 7]) == [3, 6]


def test_a_multiple_that_is_stepped_over_counts() -> None:
    assert steps_due(Cadence(5), [2, 4, 6, 8, 10]) == [6, 10]


def test_a_resumed_run_goes_on_with_the_next_multiple() -> None:
    cadence = Cadence(5)
    cadence.start(13)
    assert steps_due(cadence, range(14, 22)) == [15, 20]


def test_no_step_is_refused() -> None:
    with pytest.raises(ValueError, match="got every_n_steps=0"):
        Cadence(0)
