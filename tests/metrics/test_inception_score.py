import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchmetrics.image.inception import InceptionScore as TorchmetricsInceptionScore

from ldm.metrics import InceptionScore, as_seen
from ldm.metrics.inception_score import part_of


class TopPixel(nn.Module):
    """Logits are the four pixels of the first channel, made as sure as `sharpness` says."""

    def __init__(self, sharpness: float) -> None:
        super().__init__()
        self.num_features = 4
        self.sharpness = sharpness

    def forward(self, images):
        return images[:, 0].flatten(1) * self.sharpness


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def one_hot_images(classes: list[int]) -> torch.Tensor:
    hot = torch.nn.functional.one_hot(torch.tensor(classes), 4).float() * 2 - 1
    return hot.view(-1, 1, 2, 2).expand(-1, 3, -1, -1)


def score(pictures: torch.Tensor, *, splits: int = 1, sharpness: float = 2.0) -> InceptionScore:
    metric = InceptionScore(TopPixel(sharpness), splits=splits)
    metric.update(pictures, torch.arange(len(pictures)))
    return metric


def test_sure_and_evenly_spread_classes_score_their_number() -> None:
    mean, _ = score(one_hot_images([0, 1, 2, 3] * 5), sharpness=100.0).compute()
    assert_close(mean, torch.tensor(4.0).double())


def test_one_class_alone_scores_one() -> None:
    mean, _ = score(one_hot_images([2] * 8), sharpness=100.0).compute()
    assert_close(mean, torch.tensor(1.0).double())


def test_one_split_equals_torchmetrics() -> None:
    pictures = images(50)
    with pytest.warns(UserWarning, match="save all extracted features"):
        oracle = TorchmetricsInceptionScore(TopPixel(2.0), splits=1)
    oracle.update(as_seen(pictures))
    with pytest.warns(UserWarning, match="degrees of freedom"):
        expected, _ = oracle.compute()
    assert_close(score(pictures).compute()[0].float(), expected, rtol=1e-5, atol=0)


def test_splits_go_by_index_not_by_order_or_batch_size() -> None:
    pictures, index = images(60), torch.arange(60)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    metric = InceptionScore(TopPixel(2.0), splits=3)
    for part in order.split(7):
        metric.update(pictures[part], index[part])
    assert_close(metric.compute(), score(pictures, splits=3).compute(), rtol=1e-9, atol=1e-12)


def test_splits_average_the_scores_of_their_images() -> None:
    pictures = images(40)
    part = part_of(torch.arange(40), 2)
    each = torch.stack([score(pictures[part == number]).compute()[0] for number in (0, 1)])
    mean, deviation = score(pictures, splits=2).compute()
    assert_close(mean, each.mean())
    assert_close(deviation, each.std(correction=0))


def test_classes_that_take_turns_are_in_every_split() -> None:
    mean, deviation = score(one_hot_images([0, 1, 2, 3] * 16), splits=4, sharpness=100.0).compute()
    assert_close((mean, deviation), (torch.tensor(4.0).double(), torch.tensor(0.0).double()))


@pytest.mark.parametrize("splits", [1, 2, 3, 10])
def test_as_many_images_in_a_row_as_there_are_splits_have_one_each(splits: int) -> None:
    parts = part_of(torch.arange(10 * splits) + 10**12 * splits, splits).view(10, splits)
    assert parts.sort(dim=1).values.equal(torch.arange(splits).expand(10, splits))


def test_two_ranks_merge_to_the_score_of_one() -> None:
    pictures = images(40)
    first, second = InceptionScore(TopPixel(2.0), splits=4), InceptionScore(TopPixel(2.0), splits=4)
    first.update(pictures[:13], torch.arange(13))
    second.update(pictures[13:], torch.arange(13, 40))
    first.merge_state(second)
    assert_close(first.compute(), score(pictures, splits=4).compute(), rtol=1e-9, atol=1e-12)


def test_no_split_is_refused() -> None:
    with pytest.raises(ValueError, match="got splits=0"):
        InceptionScore(TopPixel(1.0), splits=0)
