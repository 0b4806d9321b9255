"""Single files: what is taken from them, who says what the network predicts, and one line for every mistake."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_pretrained import CLIP, TINY, WIDTH, tiny_state
from torch import Tensor

from ldm.cli.foreign import pipeline_of
from ldm.conditioners import CLIPText, Combined, OpenCLIPText
from ldm.diffusion.parameterizations import Epsilon, V
from ldm.diffusion.schedules import ScaledLinear
from ldm.interop import PretrainedModel, open_model, write_compvis, write_diffusers, write_ldm
from ldm.interop.families import recognise
from ldm.interop.safe_load import read_file
from ldm.interop.stored_config import TEXT_ENCODERS

NETWORK = "model.diffusion_model."


def saved(folder: Path, state: Mapping[str, Tensor], *, name: str = "model", **metadata: str) -> Path:
    path = folder / f"{name}.safetensors"
    save_file(dict(state), path, metadata or None)
    return path


def refused(path: Path, **settings: Any) -> str:
    with pytest.raises(ValueError) as caught:
        open_model(path, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def with_average(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The file with a moving average under the names that LDM gives its buffers."""
    averaged = {
        f"model_ema.diffusion_model{name.removeprefix(NETWORK).replace('.', '')}": tensor + 1
        for name, tensor in state.items()
        if name.startswith(NETWORK)
    }
    return state | averaged | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}


def test_a_file_becomes_the_family_with_its_schedule_and_scale(tmp_path: Path) -> None:
    model = open_model(saved(tmp_path, tiny_state("sd1")))
    assert (model.family.name, model.family.image_size, model.family.guidance_scale) == ("sd1", 512, 7.5)
    assert isinstance(model.denoiser.parameterization, Epsilon)
    expected = ScaledLinear(beta_start=0.00085, beta_end=0.012).alphas_cumprod
    torch.testing.assert_close(model.denoiser.schedule.alphas_cumprod, expected, rtol=0, atol=0)  # type: ignore[attr-defined]
    assert model.autoencoder.latent_scale.item() == pytest.approx(0.18215)
    assert not any(part.training for part in (model.denoiser, model.conditioner, model.autoencoder))


def test_tensors_are_mapped_from_the_file_and_not_copied(tmp_path: Path) -> None:
    model = open_model(saved(tmp_path, tiny_state("ldm_unconditional")))
    tensors = [*model.network.parameters(), *model.autoencoder.parameters()]
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if "model.safetensors" in line]
    spans = [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in mapped]
    assert all(any(low <= tensor.data_ptr() < high for low, high in spans) for tensor in tensors)


@pytest.mark.parametrize(("ema", "offset"), [(True, 1.0), (False, 0.0)])
def test_the_moving_average_is_taken_unless_told_otherwise(tmp_path: Path, ema: bool, offset: float) -> None:
    state = tiny_state("ldm_unconditional")
    model = open_model(saved(tmp_path, with_average(state)), ema=ema)
    weights = dict(model.network.named_parameters())
    for name, weight in weights.items():
        assert torch.equal(weight, state[NETWORK + name] + offset), name
    assert ("average" in model.origin.weights) is ema


def test_a_moving_average_that_lacks_tensors_is_refused(tmp_path: Path) -> None:
    state = with_average(tiny_state("ldm_unconditional"))
    del state["model_ema.diffusion_modelout2weight"]
    assert "lacks out.2.weight" in refused(saved(tmp_path, state))


def test_buffers_of_training_are_passed_over_and_checked_against_the_schedule(tmp_path: Path) -> None:
    state = tiny_state("sd1")
    state["alphas_cumprod"] = ScaledLinear().alphas_cumprod.half()
    state |= {name: torch.ones(1000) for name in ("betas", "sqrt_recipm1_alphas_cumprod", "posterior_mean_coef1")}
    state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    assert open_model(saved(tmp_path, state)).family.name == "sd1"
    state["alphas_cumprod"] = ScaledLinear(beta_start=0.0015, beta_end=0.0195).alphas_cumprod.float()
    assert "alphas_cumprod" in refused(saved(tmp_path, state, name="other"))


def test_names_without_text_model_are_read_too(tmp_path: Path) -> None:
    state = tiny_state("sd1")
    renamed = {name.replace("transformer.text_model.", "transformer."): tensor for name, tensor in state.items()}
    found = open_model(saved(tmp_path, renamed)).conditioner.state_dict()
    for name, tensor in found.items():
        assert torch.equal(tensor, state[f"cond_stage_model.{name}"]), name


def test_stable_diffusion_2_must_be_told_its_prediction(tmp_path: Path) -> None:
    path = saved(tmp_path, tiny_state("sd2"))
    message = refused(path)
    assert "prediction=epsilon" in message
    assert "prediction=v" in message
    told = open_model(path, prediction="v_prediction")
    assert isinstance(told.denoiser.parameterization, V)
    assert (told.family.image_size, told.origin.prediction) == (768, "prediction=")


def test_global_step_says_nothing_of_the_prediction(tmp_path: Path) -> None:
    torch.save({"state_dict": tiny_state("sd2"), "global_step": 875000}, tmp_path / "model.ckpt")
    assert "prediction=" in refused(tmp_path / "model.ckpt")


def test_the_users_word_comes_before_stored_ones_and_those_before_the_family(tmp_path: Path) -> None:
    path = saved(tmp_path, tiny_state("sd1"), **{"modelspec.prediction_type": "v"})
    assert open_model(path).family.prediction == "v"
    assert not open_model(path, prediction="v").origin.is_overruled
    told = open_model(path, prediction="epsilon")
    assert (told.family.prediction, told.origin.is_overruled) == ("epsilon", True)
    assert told.origin.prediction == "prediction=, although the file's modelspec.prediction_type says v"
    with pytest.warns(UserWarning, match="predicts epsilon, says prediction=, although"):
        pipeline_of(told)
    assert open_model(saved(tmp_path, tiny_state("sd1"), name="silent")).origin.prediction == "the family sd1"


def test_marker_tensors_tell_v_prediction_and_zero_terminal_snr(tmp_path: Path) -> None:
    marks = {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}
    model = open_model(saved(tmp_path, tiny_state("sdxl") | marks))
    assert model.family.prediction == "v"
    assert model.denoiser.schedule.has_zero_terminal_snr


def test_two_stored_words_that_disagree_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, tiny_state("sd1") | {"v_pred": torch.empty(0)}, **{"modelspec.prediction_type": "epsilon"})
    path.with_suffix(".yaml").write_text(yaml.safe_dump(config(parameterization="v")))
    assert "says epsilon" in refused(path)


def config(*, unet: Mapping[str, Any] | None = None, **params: Any) -> dict[str, Any]:
    network = {"target": "any.UNetModel", "params": {"num_heads": 8, **(unet or {})}}
    schedule = {"linear_start": 0.00085, "linear_end": 0.012, "timesteps": 1000, "scale_factor": 0.18215}
    return {"model": {"params": {**schedule, "unet_config": network, **params}}}


def test_a_yaml_beside_the_file_tells_what_shapes_do_not(tmp_path: Path) -> None:
    path = saved(tmp_path, tiny_state("sd2"))
    told = config(
        parameterization="v", scale_factor=0.3, linear_end=0.02, unet={"num_head_channels": 16, "num_heads": -1}
    )
    path.with_suffix(".yaml").write_text(yaml.safe_dump(told))
    model = open_model(path)
    assert (model.family.prediction, model.origin.prediction) == ("v", "model.yaml")
    assert model.network.arguments["num_head_channels"] == 16
    assert model.network.arguments["num_heads"] is None
    assert (model.family.beta_end, model.family.latent_scale) == (0.02, 0.3)


def stability(scaling: str, discretization: str = "LegacyDDPMDiscretization") -> dict[str, Any]:
    parts = {"scaling_config": {"target": f"any.{scaling}"}, "discretization_config": {"target": f"a.{discretization}"}}
    return config(denoiser_config={"params": parts})


def test_a_denoiser_that_ldm_does_not_have_is_refused_and_not_guessed_past(tmp_path: Path) -> None:
    path = saved(tmp_path, tiny_state("sdxl"))
    path.with_suffix(".yaml").write_text(yaml.safe_dump(stability("VScaling")))
    assert open_model(path).family.prediction == "v"
    for told in (stability("EDMScaling"), stability("VScalingWithEDMcNoise"), stability("EpsScaling", "EDMSteps")):
        path.with_suffix(".yaml").write_text(yaml.safe_dump(told))
        assert "expected EpsScaling or VScaling" in (said := refused(path)) or "expected LegacyDDPM" in said
        assert "EDM" in said


@pytest.mark.parametrize(("name", "guidance"), [("sd1", 7.5), ("sd2", 7.5), ("sdxl", 5.0), ("ldm_class", 1.0)])
def test_a_geometry_of_no_family_is_guided_as_its_text_encoder_asks(tmp_path: Path, name: str, guidance: float) -> None:
    state = tiny_state(name)
    outside = f"{NETWORK}input_blocks.0.0.weight"
    state[outside] = torch.cat([state[outside], torch.randn(64, 7, 3, 3)], dim=1)
    path = saved(tmp_path, state)
    path.with_suffix(".yaml").write_text(yaml.safe_dump(config(unet=TINY[name].network)))
    family = open_model(path).family
    assert (family.name, family.guidance_scale) == ("custom", guidance)


def test_a_geometry_of_no_family_needs_a_config_and_works_with_one(tmp_path: Path) -> None:
    state = tiny_state("ldm_churches")
    del state["scale_factor"]
    wide = {name: tensor for name, tensor in state.items() if name != f"{NETWORK}input_blocks.0.0.weight"}
    wide[f"{NETWORK}input_blocks.0.0.weight"] = torch.randn(64, 6, 3, 3)
    path = saved(tmp_path, wide)
    assert "give config=FILE.yaml" in refused(path)
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config(image_size=24, unet={"use_new_attention_order": True})))
    model = open_model(path, config=tmp_path / "own.yaml")
    assert (model.family.name, model.family.image_size) == ("custom", 48)
    assert model.network.arguments["new_attention_order"]


def test_the_yaml_that_is_written_reads_back_as_the_same_model(tmp_path: Path) -> None:
    original = open_model(saved(tmp_path, tiny_state("sdxl")), prediction="v")
    write_compvis(original, tmp_path / "written.safetensors")
    again = open_model(tmp_path / "written.safetensors")
    assert again.family == original.family
    assert again.origin.prediction == "written.yaml"
    assert {**again.network.arguments} == {**original.network.arguments}


def test_half_precision_is_written_for_all_floating_tensors(tmp_path: Path) -> None:
    state = tiny_state("ldm_unconditional")
    write_compvis(open_model(saved(tmp_path, state)), tmp_path / "half.safetensors", dtype=torch.float16)
    for name, tensor in load_file(tmp_path / "half.safetensors").items():
        assert torch.equal(tensor, state[name].half()), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_leaves_the_measured_scale_of_latents_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    state = tiny_state("ldm_churches")
    write_compvis(open_model(saved(tmp_path, state)), tmp_path / "half.safetensors", dtype=dtype)
    written = load_file(tmp_path / "half.safetensors")
    assert written[f"{NETWORK}out.2.bias"].dtype == dtype
    assert written["scale_factor"].dtype == torch.float32
    assert torch.equal(written["scale_factor"], state["scale_factor"])


def test_a_measured_scale_beside_several_encoders_goes_into_the_yaml(tmp_path: Path) -> None:
    model = open_model(saved(tmp_path, tiny_state("sdxl")))
    model.autoencoder.set_latent_scale(0.7312345)
    write_compvis(replace(model, family=replace(model.family, latent_scale=None)), tmp_path / "own.safetensors")
    told = yaml.safe_load((tmp_path / "own.yaml").read_text())["model"]["params"]["scale_factor"]
    assert told == float(model.autoencoder.latent_scale)
    assert "scale_factor" not in load_file(tmp_path / "own.safetensors")
    assert torch.equal(
        open_model(tmp_path / "own.safetensors").autoencoder.latent_scale, model.autoencoder.latent_scale
    )


def test_a_written_file_can_be_read_by_whom_any_new_file_can(tmp_path: Path) -> None:
    write_compvis(open_model(saved(tmp_path, tiny_state("ldm_unconditional"))), tmp_path / "new.safetensors")
    (tmp_path / "any").touch()
    assert (tmp_path / "new.safetensors").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_a_network_alone_takes_the_other_parts_from_a_base(tmp_path: Path) -> None:
    whole, other = tiny_state("sd1"), tiny_state("sd1", seed=1)
    bare = {name.removeprefix(NETWORK): tensor for name, tensor in other.items() if name.startswith(NETWORK)}
    path, base = saved(tmp_path, bare), saved(tmp_path, whole, name="base")
    assert "base=MODEL" in refused(path, family="sd1")
    model = open_model(path, base=base, family="sd1")
    assert torch.equal(model.network.out[2].bias, other[f"{NETWORK}out.2.bias"])  # type: ignore[index, union-attr]
    first_stage = model.autoencoder.state_dict()["quant_conv.weight"]
    assert torch.equal(first_stage, whole["first_stage_model.quant_conv.weight"])


def test_what_the_base_predicts_is_neither_asked_nor_told(tmp_path: Path) -> None:
    whole = tiny_state("sd2")
    bare = {name.removeprefix(NETWORK): tensor for name, tensor in whole.items() if name.startswith(NETWORK)}
    silent = saved(tmp_path, whole, name="silent")
    own = write_ldm(open_model(silent, prediction="epsilon"), tmp_path / "own.safetensors")
    stated = saved(tmp_path, bare, name="stated", **{"modelspec.prediction_type": "v"})
    for base in (silent, own):
        assert open_model(saved(tmp_path, bare), base=base, family="sd2", prediction="v").family.prediction == "v"
        assert open_model(stated, base=base, family="sd2").family.prediction == "v"


def test_options_that_would_have_no_effect_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, tiny_state("ldm_unconditional"))
    model = open_model(path)
    write_diffusers(model, tmp_path / "folder")
    own = write_ldm(model, tmp_path / "own.safetensors")
    for source in (path, tmp_path / "folder", own):
        assert "got ema=false" in refused(source, ema=False)
        assert "got base= for" in refused(source, base=path)


def test_a_published_network_alone_is_recognised_by_the_width_of_its_context() -> None:
    geometry = {**TINY["sd1"].network, "num_classes": None, "vector_dim": None, "use_linear_projection": False}
    geometry |= {"transformer_depth": 1, "resblock_updown": False}
    assert recognise(geometry, None) is None
    found = recognise({**geometry, "context_dim": 768}, None)
    assert found is not None
    assert found.name == "sd1"


def test_the_wrong_family_is_refused_with_the_right_one(tmp_path: Path) -> None:
    message = refused(saved(tmp_path, tiny_state("sd1")), family="sdxl")
    assert "family=sd1" in message
    assert "linear False instead of True" in message
    assert "expected one of sd1" in refused(saved(tmp_path, tiny_state("sd1"), name="b"), family="sd9")
    without_text = saved(tmp_path, tiny_state("ldm_unconditional"), name="c")
    assert "context False instead of True" in refused(without_text, family="sd1")


@pytest.mark.parametrize(
    ("lost", "part"),
    [
        (f"{NETWORK}time_embed.0.bias", "U-Net"),
        ("first_stage_model.decoder.norm_out.bias", "autoencoder"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "text encoder"),
    ],
)
def test_missing_tensors_are_named(tmp_path: Path, lost: str, part: str) -> None:
    state = tiny_state("sd1")
    del state[lost]
    message = refused(saved(tmp_path, state))
    assert part in message
    assert "1 missing" in message
    assert lost.rpartition("_model.")[2].removeprefix("transformer.text_model.") in message


def test_unexpected_tensors_are_named_and_counted(tmp_path: Path) -> None:
    state = tiny_state("sd1")
    more = {f"{NETWORK}control.{i}": torch.zeros(1) for i in range(5)}
    message = refused(saved(tmp_path, state | more))
    assert "5 unexpected: control.0, control.1, control.2 and 2 more" in message
    assert "strange.weight" in refused(saved(tmp_path, state | {"strange.weight": torch.zeros(1)}, name="b"))


def test_tensors_under_strange_names_are_told_with_those_that_are_missing(tmp_path: Path) -> None:
    state = tiny_state("sd1")
    for name in (f"{NETWORK}out.2.bias", "first_stage_model.decoder.norm_out.bias"):
        state[f"strange.{name}"] = state.pop(name)
    message = refused(saved(tmp_path, state))
    assert "2 unexpected tensors (strange." in message
    assert f"without 2 that it should have ({NETWORK}out.2.bias, first_stage_model.decoder.norm_out.bias)" in message


def test_what_shapes_of_a_text_encoder_do_not_tell_comes_back_from_a_single_file(tmp_path: Path) -> None:
    model = open_model(saved(tmp_path, tiny_state("sd1")))
    changed = {"hidden_act": "gelu", "num_attention_heads": 4, "layer_norm_eps": 1e-6}
    encoder = CLIPText({**CLIP, **changed}, padding="zero", null="zeros")
    again = rewritten(replace(model, conditioner=encoder), tmp_path / "clip.safetensors").conditioner
    assert isinstance(again, CLIPText)
    assert {name: getattr(again.tower.config, name) for name in changed} == changed
    assert (again.tokenizer.padding, again.null_kind) == ("zero", "zeros")
    assert TEXT_ENCODERS not in read_file(rewritten_path(model, tmp_path / "plain.safetensors")).metadata


def test_what_shapes_of_several_text_encoders_do_not_tell_comes_back_too(tmp_path: Path) -> None:
    model = open_model(saved(tmp_path, tiny_state("sdxl")))
    shared: dict[str, Any] = {"final_norm": False, "null": "empty"}
    first = CLIPText({**CLIP, "hidden_act": "gelu"}, layer=-2, **shared)
    second = OpenCLIPText(WIDTH, 3, 4, vocabulary_size=99, pooled=True, quick_gelu=True, **shared)
    sizes = model.conditioner.conditioners[2]
    path = tmp_path / "both.safetensors"
    again = rewritten(replace(model, conditioner=Combined([first, second, sizes])), path).conditioner
    one, other, _ = again.conditioners
    assert (one.tower.config.hidden_act, one.null_kind) == ("gelu", "empty")
    assert (other.arguments["heads"], other.quick_gelu, other.null_kind) == (4, True, "empty")


@pytest.mark.parametrize("noted", ["{", "[{}, {}]", "[3]", '[{"heads": 2}]', '[{"config": {"hidden_size": 3}}]'])
def test_a_damaged_note_about_text_encoders_is_refused(tmp_path: Path, noted: str) -> None:
    assert "does not fit its 1 text encoders (clip)" in refused(
        saved(tmp_path, tiny_state("sd1"), **{TEXT_ENCODERS: noted})
    )


def rewritten_path(model: PretrainedModel, path: Path) -> Path:
    return write_compvis(model, path)[0]


def rewritten(model: PretrainedModel, path: Path) -> PretrainedModel:
    return open_model(rewritten_path(model, path))


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"lora_unet_down_blocks_0.lora_down.weight": torch.zeros(1)}, "a LoRA file"),
        ({"down_blocks.0.resnets.0.conv1.weight": torch.zeros(1)}, "give the whole folder"),
        ({"first_stage_model.encoder.conv_in.weight": torch.zeros(1)}, "an autoencoder alone"),
        ({"bert.embeddings": torch.zeros(1)}, "1 tensors such as bert.embeddings"),
    ],
)
def test_files_of_another_kind_are_said_to_be_that(tmp_path: Path, state: dict[str, Tensor], said: str) -> None:
    assert said in refused(saved(tmp_path, state))


def test_a_measured_scale_is_read_from_the_file_and_asked_for(tmp_path: Path) -> None:
    state = tiny_state("ldm_churches")
    model: PretrainedModel = open_model(saved(tmp_path, state))
    assert torch.equal(model.autoencoder.latent_scale, state["scale_factor"])
    del state["scale_factor"]
    assert "scale_factor" in refused(saved(tmp_path, state, name="b"))


def test_a_conditioner_that_ldm_does_not_have_is_carried_and_says_so(tmp_path: Path) -> None:
    state = {name: t for name, t in tiny_state("sd1").items() if not name.startswith("cond_stage_model.")}
    state["cond_stage_model.channel_mapper.weight"] = torch.randn(3, 182, 1, 1)
    path = saved(tmp_path, state)
    path.with_suffix(".yaml").write_text(yaml.safe_dump(config()))
    model = open_model(path)
    write_compvis(model, tmp_path / "back.safetensors")
    assert load_file(tmp_path / "back.safetensors").keys() == state.keys()
    with pytest.raises(ValueError, match="cannot run"):
        model.conditioner({"caption": ["a"]})
