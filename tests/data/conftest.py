from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm.data import Record, write_shards

WriteNoise = Callable[..., Path]


@pytest.fixture
def write_noise(tmp_path: Path) -> WriteNoise:
    """Write a set of small noise images, whose column `number` and caption count them, and return its folder."""

    def write(num_samples: int, *, name: str = "set", size: int = 8, **options: Any) -> Path:
        pixels = np.random.default_rng(0).integers(0, 256, (num_samples, size, size, 3), dtype=np.uint8)
        records = (Record(image, f"noise {i}", {"number": i}) for i, image in enumerate(pixels))
        write_shards(tmp_path / name, records, **({"samples_per_shard": 7} | options))
        return tmp_path / name

    return write
