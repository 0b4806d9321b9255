import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.testing import assert_close

from ldm.metrics import FrechetDistance, InceptionScore

NUM_RANKS = 2


class Pixels(nn.Module):
    """The first four pixels."""

    num_features = 4

    def forward(self, images):
        return images[:, 0].flatten(1).double()


def images(seed: int) -> torch.Tensor:
    return torch.rand(50, 3, 2, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def measure(part: slice) -> torch.Tensor:
    """Distance and score of this part of the images, reduced over the ranks there are."""
    distance, score = FrechetDistance(Pixels()), InceptionScore(Pixels(), splits=3)
    distance.update(images(0)[part], real=True)
    distance.update(images(1)[part], real=False)
    score.update(images(1)[part], torch.arange(50)[part])
    return torch.stack([distance.compute(), *score.compute()])


def run_rank(rank: int, store: str, result: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=NUM_RANKS)
    try:
        # Unequal parts: an even share would hide a mean taken where a sum belongs.
        torch.save(measure(slice(0, 11) if rank == 0 else slice(11, None)), f"{result}{rank}")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_measure_what_one_does_on_every_rank(tmp_path) -> None:
    mp.spawn(run_rank, args=(str(tmp_path / "store"), str(tmp_path / "result")), nprocs=NUM_RANKS)
    for rank in range(NUM_RANKS):
        assert_close(torch.load(tmp_path / f"result{rank}"), measure(slice(None)), rtol=1e-9, atol=1e-12)
