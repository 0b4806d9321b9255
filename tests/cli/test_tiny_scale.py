"""`+scale=tiny`: what shrinks and what stays; and `ldm reproduce` goes to its verdict."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli_helpers import only, read_json
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from ldm.cli.cards import printed_figure
from ldm.cli.compose import compose_command, conf_folder
from ldm.cli.errors import RunFailed, UserError
from ldm.cli.main import main
from ldm.cli.reproduce import finish, half_width, judge
from ldm.cli.reproduce_evaluation import option_of, sampling_words
from ldm.cli.run_folder import RunFolder
from ldm.generation.report import Card


@pytest.fixture
def hydra() -> Iterator[None]:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        yield


def test_widths_shrink_and_what_makes_a_model_what_it_is_stays(hydra: None) -> None:
    whole = compose_command("train", ["experiment=paper/sd2_inpainting"])
    small = compose_command("train", ["experiment=paper/sd2_inpainting", "+scale=tiny"])
    for key in ("in_channels", "out_channels", "attention_resolutions", "use_linear_projection"):
        assert small.network[key] == whole.network[key]
    assert (small.network.model_channels, small.network.context_dim) == (32, 32)
    targets = [part["_target_"] for part in small.conditioner.conditioners]
    assert targets == ["ldm.conditioners.OpenCLIPText", "ldm.conditioners.MaskedImage"]
    assert list(small.requires) == ["shard dataset=tiny", *whole.requires]
    assert small.optimizer == whole.optimizer and small.schedule == whole.schedule
    assert OmegaConf.to_container(small, resolve=False)["start_from"] == "${result:paper_sd2_base}"


def test_a_run_without_a_card_is_not_shrunk(hydra: None) -> None:
    with pytest.raises(UserError, match="scale: got tiny for quickstart, expected an experiment with a paper card"):
        compose_command("train", ["+scale=tiny"])


def test_a_protocol_becomes_overrides_of_evaluate(hydra: None) -> None:
    protocol = {"sampler": {"name": "DDIM", "eta": 1.0}, "steps": 200, "guidance": {"scale": 1.5}, "image_size": [8, 8]}
    assert sampling_words(protocol, is_small=False) == [
        *("sampler=ddim", "sampler.eta=1.0", "guidance.scale=1.5", "steps=200", "image_size=[8, 8]")
    ]
    assert option_of("sampler", "PLMS") == "plms"
    with pytest.raises(UserError, match=r"card\.protocol.sampler: got Magic, expected a class of conf/sampler"):
        option_of("sampler", "Magic")


def test_a_figure_passes_where_its_interval_reaches_what_was_published() -> None:
    def verdict(values: list[float], *, higher: bool = False, tolerance: float | None = None) -> str:
        return str(judge(5.11, values, higher=higher, confidence=0.95, tolerance=tolerance)["verdict"])

    # Student's t with two degrees of freedom: 4.303 standard errors.
    assert half_width([5.0, 5.2, 5.4], 0.95) == pytest.approx(4.3027 * 0.2 / 3**0.5, rel=1e-4)
    assert verdict([5.0, 5.2, 5.4]) == "PASS"
    assert verdict([5.115]) == "PASS" and verdict([5.12]) == "FAIL" and verdict([5.10]) == "BETTER"
    assert verdict([5.3, 5.31, 5.32]) == "FAIL" and verdict([5.3, 5.31, 5.32], tolerance=0.05) == "PASS"
    assert verdict([5.3, 5.31, 5.32], higher=True) == "BETTER" and verdict([float("nan")]) == "FAIL"
    # Half of the last printed digit may be missing, however small the tolerance.
    assert verdict([5.115], tolerance=0.0) == "PASS" and verdict([5.12], tolerance=0.0) == "FAIL"


def test_a_zero_at_the_end_of_a_published_figure_is_a_printed_digit(hydra: None) -> None:
    printed = printed_figure("paper/ldm4_ffhq", "", "recall", 0.5)
    assert printed == "0.50" and printed_figure("paper/ldm4_ffhq", "", "recall", 0.6) == "0.6"
    assert judge(printed, [0.496], higher=True, confidence=0.95, tolerance=None)["verdict"] == "PASS"
    assert judge(printed, [0.48], higher=True, confidence=0.95, tolerance=None)["verdict"] == "FAIL"


def test_where_nothing_was_judged_reproducing_fails(folder: Path) -> None:
    run = RunFolder(folder, "train", OmegaConf.create({}), "settings")
    card = Card(citation="somebody", table="table 1", published={"fid": 5.11}, protocol={"steps": 1})
    with pytest.raises(RunFailed, match="nothing was judged"):
        finish(run, card, [], [])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("ldm8_churches", {"fid", "inception_score", "precision", "recall"}),
        ("ldm4_sr", {"fid", "inception_score", "psnr", "ssim"}),
        ("vq_f16", {"rfid", "inception_score", "psnr", "ssim"}),
    ],
)
def test_reproducing_ends_in_a_verdict_a_figure(
    folder: Path, name: str, figures: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce", name, "+scale=tiny", "reproduce.seeds=2"]) == 0
    said = capsys.readouterr().out
    assert "this was a miniature, whose verdicts mean nothing" in said
    run = only(folder, f"runs/tiny/paper_{name}/*")
    found = read_json(run / "reproduction.json")
    assert {one["figure"] for one in found["verdicts"]} == figures
    assert {one["verdict"] for one in found["verdicts"]} <= {"PASS", "FAIL", "BETTER"}
    assert all(line.startswith("card: ") for line in found["protocol_differences"])
    # The same command finds everything done, and says the same.
    assert main(["reproduce", name, "+scale=tiny", "reproduce.seeds=2"]) == 0
    assert "sampled" not in capsys.readouterr().out
    assert json.loads((run / "reproduction.json").read_text()) == found


def test_as_many_samples_are_drawn_as_were_asked_for_of_pictures_large_enough_to_judge(folder: Path) -> None:
    # Of three levels on pixels: the smallest picture that the network takes has four a side.
    words = ["+scale=tiny", "reproduce.seeds=1", "reproduce.num_samples=5"]
    assert main(["reproduce", "edm_cifar10_uncond_vp", *words]) == 0
    found = read_json(only(folder, "runs/tiny/paper_edm_cifar10_uncond_vp/*/reproduction.json"))
    assert math.isfinite(found["verdicts"][0]["mean"])
    assert "card: num_samples published 50000, here 5" in found["protocol_differences"]
    assert "card: image_size published [32, 32], here [8, 8]" in found["protocol_differences"]


def test_mistakes_are_one_line_each(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*words: str) -> str:
        assert main(["reproduce", *words]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        return lines[0]

    checks: list[Callable[[], bool]] = [
        lambda: "quickstart, which has no paper card" in fails(),
        lambda: "reproduce.seeds: got 0, expected at least 1" in fails("ldm4_ffhq", "reproduce.seeds=0"),
        lambda: "reproduce.confidence: got 2, expected between" in fails("ldm4_ffhq", "reproduce.confidence=2"),
        lambda: "reproduce.tolerance: got small, expected a share" in fails("ldm4_ffhq", "reproduce.tolerance=small"),
        lambda: "num_samples: got 0, expected a positive" in fails("ldm4_ffhq", "reproduce.num_samples=0"),
        lambda: "got 9 for an autoencoder, which reconstructs all" in fails("vq_f4", "reproduce.num_samples=9"),
        lambda: "nothing in paper_vq_f4 reads schedule" in fails("vq_f4", "schedule=cosine"),
        # Before anything is trained, that is, although data/ffhq is not there.
        lambda: "got the row scale_2, expected scale_1_25" in fails("ldm4_imagenet", "reproduce.rows=scale_2"),
    ]
    assert all(check() for check in checks)


@pytest.mark.slow
def test_a_row_guided_by_a_classifier_trains_it_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["+scale=tiny", "reproduce.seeds=1", "reproduce.rows=[guided]"]
    assert main(["reproduce", "adm_128", *words]) == 0, capsys.readouterr()
    run = only(folder, "runs/tiny/paper_adm_128/*")
    protocols = [read_json(file)["protocol"]["guidance"] for file in run.glob("evaluations/*/evaluation.json")]
    # The card's own row is not guided; the other says by which weights.
    assert len(protocols) == 2 and [bool(one.get("classifier_sha256")) for one in protocols].count(True) == 1
    assert {one["row"] for one in read_json(run / "reproduction.json")["verdicts"]} == {"card", "guided"}


@pytest.mark.slow
def test_a_worse_model_leads_the_sampling_of_a_better_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = {}
    for name, steps in (("better", 3), ("worse", 1)):
        words = [f"name={name}", f"trainer.max_steps={steps}", "model.sampling.num_steps=2"]
        assert main(["train", "experiment=paper/edm2_img64_s", "+scale=tiny", *words]) == 0
        runs[name] = only(folder, f"runs/tiny/{name}/*/weights.safetensors").parent
    guide = f"guidance.guide={runs['worse']}"
    made = []
    for words in (
        [guide, "guidance.scale=1"],
        [guide, "guidance.scale=3"],
        [guide, "guidance.scale=3", "sampler=euler"],
    ):
        out = folder / str(len(made))
        assert main(["sample", "prompt=3", f"checkpoint={runs['better']}", *words, f"out={out}"]) == 0
        made.append(next(out.glob("*.png")).read_bytes())
    assert len(set(made)) == 3
    capsys.readouterr()
    for words, line in {
        (guide, "guidance.classifier_scale=1"): "guidance.classifier_scale: got one beside guidance.guide",
        ("guidance.classifier_scale=1",): "guidance.classifier_scale: got one without guidance.classifier",
        (f"guidance.classifier={runs['worse']}",): "a LatentDiffusionModule, expected a NoisyClassifierModule",
        ("guidance.guide=nowhere",): "nowhere",
    }.items():
        assert main(["sample", "prompt=3", f"checkpoint={runs['better']}", *words, "out=never"]) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1 and line in said[0]
