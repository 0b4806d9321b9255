"""`ldm convert` between formats, `ldm.load` of what it wrote, and one line for every mistake."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ldm as package
from ldm.autoencoders import KLAutoencoder
from ldm.cli.convert import refuse_new_words
from ldm.cli.foreign import pretrained_of
from ldm.conditioners import CLIPText, OpenCLIPText, TextTransformer, WordTokenizer
from ldm.diffusion import Denoiser, Guidance, parameterizations, schedules, times, weightings
from ldm.generation import Pipeline, SamplingSettings
from ldm.interop import open_model, write_diffusers
from ldm.networks import UNet
from ldm.samplers import DDIM, Leading, Trailing

CLIP = {"vocab_size": 49408, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "projection_dim": 64}


def compvis_state(*, second: bool = False) -> dict[str, torch.Tensor]:
    """A narrow Stable Diffusion 1, or 2, as its file holds it."""
    torch.manual_seed(0)
    heads: dict[str, Any] = {"num_head_channels": 64} if second else {"num_heads": 8}
    network = UNet(
        4, 4, model_channels=64, channel_mult=[1, 2], num_res_blocks=1, attention_resolutions=[2], context_dim=64,
        use_linear_projection=second, **heads,
    )  # fmt: skip
    encoder = OpenCLIPText(64, 2, 1) if second else CLIPText({**CLIP, "num_attention_heads": 1})
    autoencoder = KLAutoencoder(base_channels=32, channel_mult=[1, 2, 2, 2], num_res_blocks=1)
    parts = {"model.diffusion_model": network, "cond_stage_model": encoder, "first_stage_model": autoencoder}
    return {
        f"{prefix}.{name}": tensor
        for prefix, module in parts.items()
        for name, tensor in module.state_dict().items()
        if not name.startswith("latent_")
    }


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "sd1.safetensors"
    save_file(compvis_state(), path)
    return path


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "sd2.safetensors"
    save_file(compvis_state(second=True), path)
    return path


@pytest.fixture
def fails(ldm: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `ldm convert`, which is to fail, and gives its one line."""

    def run(*overrides: str) -> str:
        assert ldm("convert", *overrides) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        return lines[0]

    return run


def test_a_file_becomes_a_folder_and_a_folder_the_same_file(
    first: Path, folder: Path, ldm: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ldm("convert", f"source={first}", "out=made") == 0
    report = capsys.readouterr().out
    for said in ("sd1", "epsilon", "the family sd1", "UNet: ", "CLIPText: ", "KLAutoencoder: ", "float32"):
        assert said in report
    assert json.loads((folder / "made/model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    assert ldm("convert", "source=made", "out=back.safetensors") == 0
    found, expected = load_file(folder / "back.safetensors"), load_file(first)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_half_precision_and_our_own_format(first: Path, folder: Path, ldm: Callable[..., int]) -> None:
    assert ldm("convert", f"source={first}", "out=own.safetensors", "format=ldm", "dtype=float16") == 0
    model = open_model(folder / "own.safetensors")
    assert {parameter.dtype for parameter in model.network.parameters()} == {torch.float16}
    assert model.family.name == "sd1"


def test_load_makes_a_pipeline_with_the_familys_settings(first: Path, second: Path) -> None:
    pipeline = package.load(first, device="cpu")
    settings = pipeline.settings
    assert (type(settings.sampler), type(settings.discretization)) == (DDIM, Leading)
    assert (settings.num_steps, settings.image_size, settings.guidance.scale) == (50, 512, 7.5)
    pictures = pipeline.sample(["a house"], seeds=[1], num_steps=2, image_size=32)
    assert pictures[0].size == (32, 32)
    assert package.load(second, device="cpu", prediction="v").settings.image_size == 768


def test_load_gives_the_same_pictures_from_every_format(first: Path, tmp_path: Path) -> None:
    write_diffusers(open_model(first), tmp_path / "folder")
    chosen: dict[str, Any] = {"seeds": [3], "num_steps": 2, "image_size": 32}
    one, other = (package.load(path, device="cpu").images(["a"], **chosen) for path in (first, tmp_path / "folder"))
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_load_takes_half_precision_files_in_full_precision(first: Path, tmp_path: Path) -> None:
    save_file({name: tensor.half() for name, tensor in load_file(first).items()}, tmp_path / "half.safetensors")
    pipeline = package.load(tmp_path / "half.safetensors", device="cpu")
    assert {parameter.dtype for parameter in pipeline.denoiser.parameters()} == {torch.float32}


def own_pipeline(**changed: Any) -> Pipeline:
    """What was trained here: words as conditions, fewer groups, a measured latent scale."""
    words = WordTokenizer(["red", "blue", "seven"], length=5)
    groups = changed.pop("norm_groups", 8)
    network = UNet(
        4, 4, model_channels=32, channel_mult=[1, 2], num_res_blocks=1, attention_resolutions=[2], num_head_channels=16,
        context_dim=16, vector_dim=16, use_scale_shift_norm=True, norm_groups=groups,
    )  # fmt: skip
    autoencoder = KLAutoencoder(base_channels=32, channel_mult=[1, 2], num_res_blocks=1, norm_groups=groups)
    autoencoder.set_latent_scale(0.7312345)
    denoiser = Denoiser(
        network,
        schedule=changed.pop("schedule", schedules.Linear()),
        parameterization=changed.pop("parameterization", parameterizations.V()),
        weighting=weightings.Unit(),
        times=times.Uniform(),
    )
    settings = SamplingSettings(DDIM(), Trailing(), Guidance(scale=2.0), 4, 16)
    conditioner = TextTransformer(words, width=16, depth=1, num_heads=2)
    return Pipeline(denoiser, conditioner=conditioner, autoencoder=autoencoder, settings=settings)


def test_what_was_trained_here_goes_to_diffusers_and_back(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    own = own_pipeline()
    model = pretrained_of(own)
    notes = write_diffusers(model, tmp_path / "folder")
    assert any("no pipeline of diffusers samples a U-Net from 4 to 4 channels" in note for note in notes)
    for architecture, place in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae")):
        report = architecture.from_pretrained(tmp_path / "folder" / place, output_loading_info=True)[1]
        assert not any(report.values()), report
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "folder" / "scheduler")
    assert scheduler.config.prediction_type == "v_prediction"
    expected = own.denoiser.schedule.alphas_cumprod.float()  # type: ignore[attr-defined]
    torch.testing.assert_close(scheduler.alphas_cumprod, expected)
    again = open_model(tmp_path / "folder")
    assert again.family.prediction == "v"
    assert torch.equal(again.autoencoder.latent_scale, own.autoencoder.latent_scale)
    for name, tensor in own.denoiser.network.state_dict().items():
        assert torch.equal(again.network.state_dict()[name], tensor), name


def test_what_was_trained_here_goes_to_a_compvis_file_where_its_code_has_the_same_norms(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="norm_groups 8 in its U-Net and norm_groups 8 in its autoencoder, expected"):
        open_and_write(own_pipeline(), tmp_path)
    own = own_pipeline(norm_groups=16)
    with pytest.raises(ValueError, match="norm_groups 16"):
        open_and_write(own, tmp_path)
    own = own_pipeline(norm_groups=32)
    again = open_and_write(own, tmp_path)
    assert torch.equal(again.autoencoder.latent_scale, own.autoencoder.latent_scale)
    assert again.network.arguments["num_head_channels"] == 16
    for name, tensor in own.denoiser.network.state_dict().items():
        assert torch.equal(again.network.state_dict()[name], tensor), name


def open_and_write(pipeline: Pipeline, folder: Path) -> Any:
    from ldm.interop import write_compvis

    write_compvis(pretrained_of(pipeline), folder / "own.safetensors")
    return open_model(folder / "own.safetensors")


@pytest.mark.parametrize(
    "changed",
    [
        {"schedule": schedules.RectifiedFlow(), "parameterization": parameterizations.Velocity()},
        {"schedule": schedules.RectifiedFlow()},
    ],
)
def test_what_other_formats_do_not_know_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="formats know"):
        pretrained_of(own_pipeline(**changed))


@pytest.mark.parametrize("kind", ["scaled", "linear", "cosine", "rescaled"])
def test_the_schedule_of_a_model_of_ours_is_recognised(kind: str) -> None:
    from ldm.interop.model import schedule_of

    schedule: schedules.DiscreteSchedule = {
        "scaled": schedules.ScaledLinear(beta_start=0.0015, beta_end=0.0155, num_steps=500),
        "linear": schedules.Linear(),
        "cosine": schedules.Cosine(),
        "rescaled": schedules.ScaledLinear(zero_terminal_snr=True),
    }[kind]
    found = schedule_of(pretrained_of(own_pipeline(schedule=schedule)).family)
    torch.testing.assert_close(found.alphas_cumprod, schedule.alphas_cumprod, rtol=1e-6, atol=1e-12)


def test_mistakes_are_one_line(first: Path, second: Path, folder: Path, fails: Callable[..., str]) -> None:
    cut, code, lacking = folder / "cut.safetensors", folder / "code.ckpt", folder / "lacking.safetensors"
    cut.write_bytes(first.read_bytes()[:100_000])
    torch.save({"state_dict": {"a": torch.zeros(1)}, "extra": print}, code)
    state = compvis_state()
    del state["model.diffusion_model.out.2.bias"]
    save_file(state, lacking)
    (folder / "there").mkdir()
    assert "cut short" in fails(f"source={cut}", "out=a")
    assert "print, which could run code" in fails(f"source={code}", "out=a")
    assert "1 missing: out.2.bias" in fails(f"source={lacking}", "out=a")
    assert "prediction=epsilon" in fails(f"source={second}", "out=a")
    assert "family=sd1" in fails(f"source={first}", "out=a", "family=sdxl")
    assert "expected one of epsilon" in fails(f"source={first}", "out=a", "prediction=noise")
    assert "no moving average" in fails(f"source={first}", "out=a", "ema=false")
    assert "holds all its parts" in fails(f"source={first}", "out=a", f"base={first}")
    assert "no file" in fails("source=absent.safetensors", "out=a")
    assert "exists already" in fails(f"source={first}", "out=there")
    assert "did you mean diffusers" in fails(f"source={first}", "out=a", "format=difusers")
    assert "dtype: got int8" in fails(f"source={first}", "out=a", "dtype=int8")
    assert "source: got none" in fails("out=a")
    for name in ("a.ckpt", "a.pt", "a.pth", "a.bin"):
        assert "expected NAME.safetensors, or a folder" in fails(f"source={first}", f"out={name}")
        assert "expected a folder" in fails(f"source={first}", f"out={name}", "format=diffusers")
        assert not (folder / name).exists()
    assert "expected a folder" in fails(f"source={first}", "out=b.safetensors", "format=diffusers")
    assert not (folder / "a").exists()


def test_a_text_encoder_that_other_programs_compute_otherwise_is_noted(
    first: Path, folder: Path, ldm: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    write_diffusers(open_model(first), folder / "made")
    config = folder / "made/text_encoder/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_act": "gelu"}))
    assert ldm("convert", "source=made", "out=back.safetensors") == 0
    assert "only ldm reads hidden_act gelu of the text encoder" in capsys.readouterr().out
    again = open_model(folder / "back.safetensors").conditioner
    assert again.tower.config.hidden_act == "gelu"  # type: ignore[union-attr]


def test_a_model_that_was_taught_a_word_is_refused_with_what_to_do(first: Path) -> None:
    pipeline = package.load(first, device="cpu")
    assert isinstance(pipeline.conditioner, CLIPText)
    pipeline.conditioner.add_tokens(["<cat>"], torch.zeros(1, 1, 64))
    with pytest.raises(ValueError, match="was taught <cat>, expected one with CLIP's own words; convert the model"):
        refuse_new_words(pretrained_of(pipeline))


def test_load_refuses_what_a_run_of_ours_says_itself(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="says all itself"):
        package.load(tmp_path, prediction="v")
