import math

import pytest
import torch

from ldm.nn import timestep_embedding


def test_cosines_come_first_and_frequencies_fall_geometrically_over_half() -> None:
    t = torch.tensor([0.0, 3.0, 999.0], dtype=torch.float64)

    embedding = timestep_embedding(t, 6)

    for row, time in zip(embedding, t.tolist(), strict=True):
        angles = [time * 10_000 ** (-i / 3) for i in range(3)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        torch.testing.assert_close(row, torch.tensor(expected, dtype=torch.float64))


def test_integer_times_embed_as_float32() -> None:
    torch.testing.assert_close(timestep_embedding(torch.tensor([7]), 8), timestep_embedding(torch.tensor([7.0]), 8))


def test_an_odd_width_is_refused() -> None:
    with pytest.raises(ValueError, match="got an embedding of width 7, expected an even width"):
        timestep_embedding(torch.zeros(1), 7)
