import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from metric_helpers import METRICS, NUM_IMAGES, Pixels, images, values
from torch.testing import assert_close

from ldm.metrics import FrechetDistance

NUM_RANKS = 2
# Where the first rank's images end. Unequal parts: an even share would hide a mean taken where a sum belongs.
BORDERS = {"unequal": 11, "one_rank_sees_nothing": 0}


def measure(part: slice) -> dict[str, torch.Tensor]:
    """Every metric of this part of the images, reduced over the ranks there are."""
    places = torch.arange(NUM_IMAGES)[part]
    found = {name: values(name, [places] if len(places) else []) for name in METRICS}
    distance = FrechetDistance(Pixels())
    distance.update(images()[part], real=True)
    statistics = distance.statistics(real=True)
    return found | {"mean": statistics.mean, "count": torch.tensor(statistics.count), "kept": distance.counts}


def run_rank(rank: int, store: str, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=NUM_RANKS)
    try:
        for name, border in BORDERS.items():
            found = measure(slice(0, border) if rank == 0 else slice(border, None))
            torch.save(found, f"{folder}/{name}{rank}")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(run_rank, args=(str(folder / "store"), str(folder)), nprocs=NUM_RANKS)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", BORDERS)
def test_two_processes_measure_what_one_does_on_every_rank(name, folder) -> None:
    expected = measure(slice(None))
    parts = [BORDERS[name], NUM_IMAGES - BORDERS[name]]
    for rank in range(NUM_RANKS):
        found = torch.load(folder / f"{name}{rank}")
        # Afterwards each rank goes on with its own images.
        assert found.pop("kept").tolist() == [0, parts[rank]]
        assert_close(found, {k: v for k, v in expected.items() if k != "kept"}, rtol=1e-9, atol=1e-12)
