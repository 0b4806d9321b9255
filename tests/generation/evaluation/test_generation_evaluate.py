import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close
from torchmetrics import Metric

from ldm.diffusion import Guidance
from ldm.generation import Pipeline
from ldm.generation.evaluation.evaluate import Evaluation
from ldm.metrics import as_seen

PROMPTS = [{"prompt": "red", "digit": 3}, {"prompt": "blue", "digit": 4}, {"prompt": "seven", "digit": 7}]


class Sums(Metric):
    """The sums of generated and real pixels and labels."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("generated", "real", "labels", "real_labels"):
            self.add_state(name, torch.zeros(()), dist_reduce_fx="sum")

    def update(self, images: Tensor, labels: Mapping[str, Tensor], *, real: bool) -> None:
        if real:
            self.real += images.sum()
            self.real_labels += labels["digit"].sum()
        else:
            self.generated += images.sum()
            self.labels += labels["digit"].sum()

    def compute(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("generated", "real", "labels", "real_labels")}


class Real:
    """Two batches of a validation split."""

    def iterate_once(self, split: str, batch_size: int) -> Iterator[dict[str, Any]]:
        assert split == "validation"
        for value in (1.0, -0.5):
            yield {"image": torch.full((2, 3, 4, 4), value), "digit": torch.tensor([1, 2])}


def make(**options: Any) -> Evaluation:
    return Evaluation(**{"prompts": PROMPTS, "metrics": {"sums": Sums()}, "reference": Real(), "seed": 10} | options)


def test_metrics_see_one_image_a_prompt_and_every_real_one(
    make_pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    pipeline = make_pipeline()
    report = make()(pipeline, tmp_path / "new" / "folder", num_steps=2)
    images = as_seen(pipeline.images([prompt["prompt"] for prompt in PROMPTS], seeds=[10, 11, 12], num_steps=2))
    assert report["sums/generated"] == pytest.approx(images.sum().item(), abs=1e-2)
    assert report["sums/real"] == pytest.approx(2 * 48 * as_seen(torch.tensor([1.0, -0.5])).sum().item())
    assert (report["sums/labels"], report["sums/real_labels"], report["num_images"]) == (14, 6, 3)
    written = json.loads((tmp_path / "new" / "folder" / "evaluation.json").read_text())
    assert {name: written[name] for name in report} == report
    with Image.open(tmp_path / "new" / "folder" / "evaluation.png") as sheet:
        assert sheet.size == (2 * 18 + 2, 2 * 18 + 2)


def test_a_second_evaluation_starts_afresh(make_pipeline: Callable[..., Pipeline], tmp_path: Path) -> None:
    evaluation, pipeline = make(), make_pipeline()
    first, second = (evaluation(pipeline, tmp_path) for _ in range(2))
    for report in (first, second):
        del report["seconds_sampling"], report["seconds_measuring"]
    assert_close(second, first)


def test_a_guidance_interval_without_an_end_is_part_of_the_plan(make_pipeline: Callable[..., Pipeline]) -> None:
    evaluation, pipeline = make(), make_pipeline()
    plans = [
        evaluation.plan(evaluation.facts(pipeline, guidance=Guidance(scale=2.0, interval=interval)))
        for interval in (None, (0.5, math.inf))
    ]
    assert [plan["guidance"]["interval"] for plan in plans] == [[0.0, "inf"], [0.5, "inf"]]
    assert json.loads(json.dumps(plans, allow_nan=False)) == plans


def test_a_label_that_one_prompt_lacks_is_missed_before_sampling(
    make_pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    metric = Sums()
    metric.column = "digit"
    evaluation = make(metrics={"sums": metric}, prompts=[*PROMPTS, {"prompt": "five"}])
    with pytest.raises(ValueError, match=r"sums: got prompts with the labels \[\], such as 'five', expected digit"):
        evaluation(make_pipeline(), tmp_path)
    assert not (tmp_path / "samples").exists()


def test_an_evaluation_of_nothing_refuses_to_build() -> None:
    with pytest.raises(ValueError, match=r"^got no prompts to evaluate, expected at least one"):
        make(prompts=[])
