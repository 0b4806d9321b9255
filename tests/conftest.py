"""Settings of the whole suite."""

import os
from collections.abc import Iterator

import pytest

# Tests run side by side: one thread each, and one in every process that they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def environment_as_before() -> Iterator[None]:
    """Takes back what a test did to the environment: a rank in it would keep the next from starting processes."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
