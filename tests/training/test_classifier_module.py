from functools import partial
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from torch.testing import assert_close
from torch.utils.data import DataLoader

from ldm.data.digits import PALETTE, load_scans, split_scans
from ldm.networks import DigitClassifier
from ldm.training import DigitClassifierModule
from ldm.training.classifier import move, pick_colours
from ldm.training.optim import cosine

COLOURS = [list(colour) for colour in PALETTE.values()]


def module(*, width: int = 8, num_steps: int = 100) -> DigitClassifierModule:
    torch.manual_seed(0)
    return DigitClassifierModule(
        DigitClassifier(COLOURS, width=width, feature_dim=16),
        optimizer=partial(torch.optim.AdamW, lr=5e-3),
        lr_schedule=partial(cosine, num_steps=num_steps, num_warmup_steps=num_steps // 8),
    )


def rendered(scans: torch.Tensor, digits: torch.Tensor, *, start: int) -> dict[str, torch.Tensor]:
    """A batch of scans (B, 8, 8), all in red on white, blown up to 32x32."""
    maps = scans.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2).unsqueeze(1)
    ink, paper = torch.full_like(digits, 2), torch.full_like(digits, 1)
    position = torch.arange(start, start + len(digits))
    image = DigitClassifier(COLOURS).paint(maps, ink, paper)
    return {"image": image, "digit": digits, "ink": ink, "paper": paper, "position": position}


class Scans(pl.LightningDataModule):
    """Real scans, all in red on white."""

    def __init__(self) -> None:
        super().__init__()
        scans, digits = (torch.from_numpy(array) for array in load_scans())
        self.splits = {
            name: rendered(scans[index], digits[index], start=0)
            for name, index in zip(("train", "validation"), split_scans(), strict=True)
        }

    def iterate_once(self, split: str, batch_size: int):
        batch = self.splits[split]
        for start in range(0, len(batch["digit"]), batch_size):
            yield {name: values[start : start + batch_size] for name, values in batch.items()}

    def train_dataloader(self):
        return DataLoader(list(self.iterate_once("train", 64)), batch_size=None)

    def val_dataloader(self):
        return DataLoader(list(self.iterate_once("validation", 64)), batch_size=None)


def batch(count: int = 8) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return rendered(torch.rand(count, 8, 8, generator=generator), torch.arange(count) % 10, start=100)


def test_repainting_draws_every_pair_of_different_colours_about_as_often() -> None:
    first, second = torch.rand(2, 30_000, generator=torch.Generator().manual_seed(0))
    ink, paper = pick_colours(first, second, num_colours=6)
    counts = torch.bincount(ink * 6 + paper, minlength=36).view(6, 6)
    assert counts.diagonal().sum() == 0
    off_diagonal = counts[~torch.eye(6, dtype=torch.bool)]
    assert off_diagonal.min() > 850 and off_diagonal.max() < 1150


def test_repainted_images_depend_on_position_alone_not_on_the_rest_of_the_batch() -> None:
    trained, whole = module(), batch(8)
    images, ink, paper = trained.repaint(whole)
    part = trained.repaint({name: values[3:5] for name, values in whole.items()})
    assert_close(part, (images[3:5], ink[3:5], paper[3:5]), rtol=0, atol=1e-6)


def test_repainted_images_stay_in_range() -> None:
    images, _, _ = module().repaint(batch())
    assert images.min() >= -1 and images.max() <= 1


def test_no_turn_shift_or_scale_leaves_maps_as_they_are() -> None:
    maps = torch.rand(3, 1, 32, 32)
    assert_close(move(maps, torch.zeros(4, 3), rotation=10, shift=0.1, scale=0.1), maps, atol=1e-5, rtol=0)


def test_a_shift_moves_by_its_share_of_the_side() -> None:
    maps = torch.rand(1, 1, 32, 32)
    right = torch.tensor([0.0, 0.0, 1.0, 0.0]).view(4, 1)
    moved = move(maps, right, rotation=0, shift=4 / 32, scale=0)
    assert_close(moved[..., :-4], maps[..., 4:], atol=1e-5, rtol=0)


def test_a_quarter_turn_turns_the_map() -> None:
    maps = torch.rand(1, 1, 32, 32)
    turned = move(maps, torch.tensor([1.0, 0.0, 0.0, 0.0]).view(4, 1), rotation=90, shift=0, scale=0)
    assert_close(turned, maps.rot90(1, (2, 3)), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_a_short_training_on_one_pair_of_colours_reads_real_scans_and_exports_itself(tmp_path) -> None:
    data, trained = Scans(), module(width=16, num_steps=90)
    trainer = pl.Trainer(
        max_steps=90,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(trained, data)
    arguments = {"palette": COLOURS, "width": 16, "feature_dim": 16}
    config = {"model": {"classifier": {"_target_": "ldm.networks.DigitClassifier", **arguments}}}
    result = trained.finish(tmp_path, data=data, config=config)
    assert result["digit_accuracy"] > 0.9
    assert result["ink_accuracy"] == result["paper_accuracy"] == 1
    validation = data.splits["validation"]
    prediction = DigitClassifier.load(tmp_path / result["classifier"])(validation["image"])
    accuracy = (prediction.digit.argmax(1) == validation["digit"]).double().mean().item()
    assert accuracy == pytest.approx(result["digit_accuracy"])


def test_the_palette_of_the_config_is_the_data_sets() -> None:
    node = OmegaConf.load(Path(__file__).parents[2] / "conf/model/digit_classifier.yaml")
    assert node["classifier"]["palette"] == COLOURS
