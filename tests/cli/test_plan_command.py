"""`ldm plan` and `ldm train +memory`, as typed; published throughput within the error that is stated."""

from pathlib import Path

import pytest
from cli_helpers import read_json
from omegaconf import OmegaConf

from ldm.cli import plan_published
from ldm.cli.main import main
from ldm.cli.plan import share_of_batch

TINY = ["experiment=quickstart", "trainer.precision=bf16-mixed"]


def test_a_plan_says_batch_memory_time_and_hours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    machines = ["gpus=16", "hardware=h100", "interconnect=infiniband_hdr"]
    assert main(["plan", *TINY, *machines, "trainer.max_steps=4000", f"out={out}"]) == 0
    said, found = capsys.readouterr().out, read_json(out)

    assert "32 = 16 GPUs x 2 at once x 1 accumulated" in said
    assert "trainer.devices=8 trainer.num_nodes=2 data.batch_size=32 trainer.accumulate_grad_batches=1" in said
    assert "16 x H100, 2 nodes, InfiniBand HDR" in said
    assert found["parameters"]["network"] == 1080324
    assert found["memory"]["fits"] is True
    assert found["hours"] == pytest.approx(4000 * found["seconds"]["step"] / 3600)
    assert found["gpu_hours"] == pytest.approx(16 * found["hours"])
    assert found["batch"]["micro"] * found["gpus"] * found["batch"]["accumulate"] == 32
    assert f"errs by {plan_published.MEDIAN_ERROR:.0%} in the median" in said


def test_no_accumulation_is_one_batch_a_step() -> None:
    config = OmegaConf.create({"data": {"batch_size": 6}, "trainer": {"accumulate_grad_batches": None}})
    assert share_of_batch(config, 2) == 3


def test_training_says_its_memory_and_does_not_train(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *TINY, "data.batch_size=64", "trainer.accumulate_grad_batches=2", "+memory"]) == 0
    said = capsys.readouterr().out
    assert "128 = 1 GPUs x 64 at once x 2 accumulated" in said
    assert "A100 40 GB" in said and "B200" in said and "activations" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_small_picture_is_told_in_any_case(capsys: pytest.CaptureFixture[str]) -> None:
    # Its noise is drawn by positions, which have no values while planning.
    assert main(["plan", "experiment=paper/sd2_x4"]) == 0
    said = capsys.readouterr().out
    assert "GPU-hours" in said and "not counted" not in said


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["gpus=7"], "gpus: got 7, expected a divisor of the global batch 32"),
        (["gpus=0"], "gpus: got 0, expected a whole number from 1 on"),
        (["hardware=h10"], "did you mean h100?"),
        (["interconnect=infiniband"], "did you mean infiniband_"),
        (["hardware.bf16=-1"], "hardware.bf16: got -1, expected a positive number"),
        (["trainer.precision=bf16"], "trainer.precision: got bf16, expected one of 32"),
        (["stack=egger"], "did you mean eager?"),
        (["latents=perhaps"], "latents: got perhaps, expected auto, precomputed or encoded"),
        (["micro_batch=5"], "micro_batch: got 5, expected a divisor of 32"),
        (["experiment=digits_classifier"], "expected latent diffusion, an autoencoder or a noisy classifier"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    said = capsys.readouterr().err
    assert line in said
    assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize("experiment", ["digits_autoencoder", "paper/vq_f4"])
def test_an_autoencoder_is_planned_with_both_of_its_networks(
    experiment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", f"experiment={experiment}"]) == 0
    said = capsys.readouterr().out
    assert "discriminator" in said and "GPU-hours" in said


def test_a_noisy_classifier_is_planned_with_the_arithmetic_that_its_card_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    assert main(["plan", "experiment=paper/adm_64_classifier", "gpus=8", f"out={out}"]) == 0
    found, said = read_json(out), capsys.readouterr().out
    # `ldm papers` counts 19.04 thousand million multiply-adds, and the table has 65 M parameters.
    assert found["flops_per_image"]["forward"] == pytest.approx(2 * 19.04e9, rel=1e-3)
    assert round(found["parameters"]["classifier"] / 1e6) == 65
    # It has no average, and what is no network of a denoiser cannot recompute its blocks.
    assert "average" not in said.partition("memory of one device")[2].partition("in all")[0]
    assert "checkpoint_blocks" not in said


def test_a_model_of_pixels_has_no_first_stage_to_spare(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "experiment=paper/edm_cifar10_cond_vp", "+memory"]) == 0
    said = capsys.readouterr().out
    assert "less memory: " in said and "latents=precomputed" not in said


@pytest.mark.slow
def test_published_throughput_is_met_within_the_stated_error() -> None:
    found = plan_published.compare()
    middle, worst = plan_published.errors(found)
    fitted = [one.error for one in found if one.row.fitted]

    assert len(fitted) == 3
    assert all(abs(error) < 0.01 for error in fitted)
    assert round(middle, 2) == plan_published.MEDIAN_ERROR
    assert round(worst, 2) == plan_published.WORST_ERROR
    stable_diffusion = [abs(one.error) for one in found if one.row.source != "NeMo" and not one.row.fitted]
    assert sorted(stable_diffusion)[-2] < 0.2


@pytest.mark.slow
def test_encoding_while_training_costs_about_what_was_published() -> None:
    # MosaicML: 1.4 times the time.
    assert plan_published.encoding_ratio(256) == pytest.approx(1.4, abs=0.1)
    assert plan_published.encoding_ratio(512) == pytest.approx(1.4, abs=0.15)
