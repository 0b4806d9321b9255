"""Pictures of what validation samples tell: each is told its own sample, whatever the batches."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.autoencoders import IdentityAutoencoder
from ldm.conditioners import LowResolution
from ldm.data import Record, ShardDataModule, write_shards
from ldm.data.degradation import LowResolution as SmallPictures
from ldm.diffusion import Conditioning, Denoiser, Guidance, parameterizations, schedules, times, weightings
from ldm.generation import Order, Pipeline, SamplingSettings
from ldm.generation.evaluation.evaluate import Evaluation, Subject
from ldm.generation.evaluation.images import open_images
from ldm.generation.evaluation.told import evaluate_told, telling
from ldm.generation.evaluation.workers import FreeWorkers
from ldm.generation.report.strips import read_strips, strip_tasks
from ldm.metrics import FrechetDistance, RandomFeatures
from ldm.metrics.reconstruction import ReconstructionQuality
from ldm.samplers import DDIM, Trailing


class Believes(nn.Module):
    """Says that the picture is what it is told, enlarged: x_0 itself."""

    in_channels, downsampling_factor = 6, 1

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        assert cond.concat is not None
        return self.weight * nn.functional.interpolate(cond.concat, size=x.shape[-2:])


def pipeline() -> Pipeline:
    denoiser = Denoiser(
        Believes(),
        schedule=schedules.RectifiedFlow(),
        parameterization=parameterizations.X0(),
        weighting=weightings.Unit(),
        times=times.Uniform(),
    )
    settings = SamplingSettings(DDIM(eta=0.0), Trailing(), Guidance(scale=1.0), num_steps=2, image_size=16)
    return Pipeline(denoiser, conditioner=LowResolution(), autoencoder=IdentityAutoencoder(), settings=settings)


def test_picture_i_is_made_of_what_sample_i_tells(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(20, 230, (7, 1, 1, 3))
    pictures = (np.broadcast_to(colours, (7, 16, 16, 3))).astype(np.uint8)
    write_shards(tmp_path / "set", [Record(picture, f"picture {i}") for i, picture in enumerate(pictures)])
    data = ShardDataModule(
        str(tmp_path / "set"), str(tmp_path / "set"), batch_size=4, resolution=16, derive=SmallPictures(4)
    )
    metrics: dict[str, Any] = {
        "reconstruction": ReconstructionQuality(),
        "fid": FrechetDistance(features=RandomFeatures(4)),
    }
    model = pipeline()
    evaluation = Evaluation(metrics=metrics, reference=data, seed=5, shard_size=4, batch_size=3)
    subject = Subject(tmp_path / "out", torch.device("cpu"), {}, FreeWorkers())

    tell = telling(evaluation, model, data)
    figures = evaluate_told(evaluation, model, tell, subject)

    assert figures["num_images"] == 7 and figures["reconstruction/psnr"] > 45
    made = open_images(tmp_path / "out")
    for i, picture in enumerate(pictures):
        assert np.abs(made[i]["image"].permute(1, 2, 0).numpy().astype(int) - picture).max() <= 1
        assert made[i]["prompt"] == f"picture {i}"

    order = Order("", 5 + 3)
    tasks = strip_tasks(
        model, [order], tmp_path, indices=[3], settings=model.settings, how=lambda order: tell([order.seed])
    )
    tasks[0].run()
    (strip,) = read_strips(tmp_path)
    assert np.abs(np.asarray(strip.picture)[8, 8].astype(int) - pictures[3, 0, 0]).max() < 8
