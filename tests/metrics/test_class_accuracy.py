import pytest
import torch
from metric_helpers import Pixels, images
from torch.testing import assert_close
from torchmetrics.functional.classification import multiclass_accuracy

from ldm.metrics import ClassAccuracy, as_seen


def accuracy(pictures: torch.Tensor, labels: torch.Tensor, top_k: int = 1) -> torch.Tensor:
    metric = ClassAccuracy(Pixels(), top_k=top_k)
    metric.update(pictures, labels)
    return metric.compute()


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_share_equals_torchmetrics(top_k: int) -> None:
    pictures, labels = images(60), torch.arange(60) % 4
    logits = Pixels()(as_seen(pictures))
    expected = multiclass_accuracy(logits, labels, num_classes=4, average="micro", top_k=top_k)
    assert_close(accuracy(pictures, labels, top_k), expected.double())


def test_the_classes_that_the_judge_sees_are_all_right() -> None:
    pictures = images(20)
    assert accuracy(pictures, Pixels()(as_seen(pictures)).argmax(dim=1)) == 1


@pytest.mark.parametrize("labels", [torch.tensor([0, 4]), torch.tensor([-1, 0]), torch.tensor([0])])
def test_labels_that_do_not_fit_are_refused(labels) -> None:
    with pytest.raises(ValueError, match="expected one each from 0 to 3"):
        accuracy(images(2), labels)


@pytest.mark.parametrize("top_k", [0, 5])
def test_impossible_guesses_are_refused(top_k: int) -> None:
    with pytest.raises(ValueError, match=f"got top_k={top_k}"):
        ClassAccuracy(Pixels(), top_k=top_k)
