import pytest
import torch

from ldm.networks.conditions import class_vectors


def test_class_vectors_have_magnitude_one_and_stand_at_right_angles() -> None:
    vectors = class_vectors(torch.arange(6), 6)
    torch.testing.assert_close(vectors @ vectors.T / 6, torch.eye(6))


def test_the_id_after_the_last_is_no_class() -> None:
    torch.testing.assert_close(class_vectors(torch.tensor([3, 2]), 3)[0], torch.zeros(3))


def test_an_id_beyond_that_is_refused() -> None:
    with pytest.raises(RuntimeError, match="Class values must be smaller"):
        class_vectors(torch.tensor([4]), 3)
