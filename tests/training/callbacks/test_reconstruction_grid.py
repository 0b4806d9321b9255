import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning.demos.boring_classes import BoringModel
from torch.testing import assert_close

from ldm.metrics import quantize
from ldm.training.callbacks import ReconstructionGrid


def test_every_validation_writes_originals_above_reconstructions(tiny, data, fit, tmp_path) -> None:
    callback = ReconstructionGrid(tmp_path / "samples", num_images=2)
    fit(tiny, data, [callback], max_steps=6, limit_val_batches=1.0, val_check_interval=3)
    paths = sorted((tmp_path / "samples").iterdir())
    assert [path.name for path in paths] == [f"reconstruction_step={step:06d}.png" for step in (3, 6)]
    sheet = torch.from_numpy(np.array(Image.open(paths[0])))
    images = next(data.iterate_once("validation", 2))["image"]
    for column in range(2):
        across = slice(2 + 10 * column, 10 + 10 * column)
        assert_close(sheet[2:10, across].permute(2, 0, 1), quantize(images[column]))
        assert_close(sheet[12:20, across].permute(2, 0, 1), quantize(-images[column]))


def test_fewer_grids_than_validations_are_possible(tiny, data, fit, tmp_path) -> None:
    callback = ReconstructionGrid(tmp_path / "samples", every_n_steps=4)
    fit(tiny, data, [callback], max_steps=8, limit_val_batches=1.0, val_check_interval=2)
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == ["reconstruction_step=000004.png", "reconstruction_step=000008.png"]


def test_a_module_that_cannot_reconstruct_is_refused_with_the_remedy(data, fit, tmp_path) -> None:
    with pytest.raises(ValueError, match="got callback reconstruction_grid with BoringModel"):
        fit(BoringModel(), data, [ReconstructionGrid(tmp_path)])
