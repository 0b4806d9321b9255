"""LoRA on our own models: names, scales, merging, and files that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lora_models import ids, inputs, random_lora, sd1, sdxl
from safetensors.torch import save_file
from torch import Tensor

from ldm.conditioners import Conditioner
from ldm.diffusion import Denoiser
from ldm.interop.lora import adapters, apply_lora, bake, merge, set_scale, unmerge, write_lora
from ldm.interop.lora_files import kohya_name, read_lora
from ldm.interop.lora_layers import Parts

Model = tuple[Denoiser, Conditioner]
Write = Callable[..., Path]
TO_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@torch.no_grad()
def output(model: Model) -> Tensor:
    network = model[0].network
    return network(*inputs(network))


def pair(rank: int = 2, *, inside: tuple[int, ...] = (16,), out: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *inside, generator=generator)
    return down, torch.randn(out, rank, *[1] * (len(inside) - 1), generator=generator)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(tensors: dict[str, Tensor], name: str = "some.safetensors", **metadata: str) -> Path:
        save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / name, metadata=metadata)
        return tmp_path / name

    return write


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Path]:
    def make(build: Callable[[], Model], name: str, **options: object) -> Path:
        model = build()
        random_lora(Parts(*model), **options)
        write_lora(*model, tmp_path / name)
        return tmp_path / name

    return make


@pytest.mark.parametrize(
    ("build", "theirs", "module"),
    [
        (sd1, TO_Q, "network.input_blocks.1.1.transformer_blocks.0.attn1.to_q"),
        (sd1, "lora_unet_mid_block_attentions_0_proj_in", "network.middle_block.1.proj_in"),
        (sd1, "lora_unet_up_blocks_1_attentions_1_transformer_blocks_0_ff_net_0_proj", "network.output_blocks.3.1"),
        (sd1, "lora_te1_text_model_encoder_layers_1_mlp_fc1", "conditioner.transformer"),
        (sdxl, "lora_unet_input_blocks_3_1_transformer_blocks_0_attn2_to_out_0", "network.input_blocks.3.1"),
        (sdxl, "lora_unet_output_blocks_0_1_transformer_blocks_1_attn2_to_k", "network.output_blocks.0.1"),
        (sdxl, "lora_unet_label_emb_0_0", "network.label_emb.0.0"),
        (sdxl, "lora_te1_text_model_encoder_layers_0_self_attn_q_proj", "conditioner.conditioners.0.transformer"),
        (sdxl, "lora_te2_text_model_encoder_layers_1_self_attn_v_proj", "conditioner.conditioners.1.model"),
        (sdxl, "lora_te2_text_model_encoder_layers_1_mlp_fc2", "conditioner.conditioners.1.model"),
    ],
)
def test_names_of_published_files_find_their_layer(build: Callable[[], Model], theirs: str, module: str) -> None:
    (found,) = [layer.module for layer in Parts(*build()).layers() if theirs in layer.names]
    assert found.startswith(module)


@pytest.mark.parametrize(
    "name",
    [
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q",
        "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    ],
)
def test_every_format_leads_to_the_same_layer(name: str) -> None:
    assert kohya_name(name) == TO_Q


def test_old_names_of_attention_lead_to_the_new() -> None:
    assert kohya_name("lora_te_text_model_x") == "lora_te1_text_model_x"
    assert kohya_name("text_encoder.text_model.encoder.layers.0.self_attn.to_out").endswith("self_attn_out_proj")
    assert kohya_name("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out").endswith("attn2_to_out_0")


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("lora_unet_{_}.lora_down.weight", "lora_unet_{_}.lora_up.weight"),
        ("unet.{.}.lora_A.weight", "unet.{.}.lora_B.weight"),
        ("unet.{.}.lora.down.weight", "unet.{.}.lora.up.weight"),
        ("unet.{.}_lora.down.weight", "unet.{.}_lora.up.weight"),
        ("base_model.model.{.}.lora_A.weight", "base_model.model.{.}.lora_B.weight"),
    ],
)
def test_every_format_adds_up_times_down_to_the_weight(down: str, up: str, write: Write) -> None:
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    names = [text.replace("{_}", name.replace(".", "_")).replace("{.}", name) for text in (down, up)]
    model = sd1()
    layer = model[0].network.middle_block[1].transformer_blocks[0].attn1
    before = layer.to_q.weight.clone()
    a, b = pair(inside=(32,), out=32)
    apply_lora(*model, write(dict(zip(names, (a, b), strict=True))), scale=0.5)
    bake(*model)
    torch.testing.assert_close(layer.to_q.weight, before + 0.5 * b @ a)


def test_alpha_divided_by_the_rank_scales(write: Write) -> None:
    a, b = pair()
    path = write({f"{TO_Q}.lora_down.weight": a, f"{TO_Q}.lora_up.weight": b, f"{TO_Q}.alpha": torch.tensor(6.0)})
    model = sd1()
    layer = model[0].network.input_blocks[1][1].transformer_blocks[0].attn1
    before = layer.to_q.weight.clone()
    apply_lora(*model, path)
    bake(*model)
    torch.testing.assert_close(layer.to_q.weight, before + 3 * b @ a)


def test_the_alphas_of_pefts_config_count(write: Write, tmp_path: Path) -> None:
    a, b = pair()
    name = "base_model.model.mid_block.attentions.0.proj_in"
    path = write({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, "adapter_model.safetensors")
    config = {"lora_alpha": 8, "alpha_pattern": {"proj_out": 5}, "use_rslora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (layer,) = read_lora(tmp_path).values()
    assert layer.alpha / layer.rank == pytest.approx(8 / 2**0.5)
    assert path.is_file()


def test_three_convolutions_of_locon_are_two(write: Write) -> None:
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    down, mid, up = torch.randn(2, 16, 1, 1), torch.randn(3, 2, 3, 3), torch.randn(16, 3, 1, 1)
    path = write({f"{name}.lora_down.weight": down, f"{name}.lora_mid.weight": mid, f"{name}.lora_up.weight": up})
    model = sd1()
    conv = model[0].network.input_blocks[1][0].in_layers[2]
    x, weight = torch.randn(1, 16, 5, 5), conv.weight.clone()
    apply_lora(*model, path)
    bake(*model)
    changed = model[0].network.input_blocks[1][0].in_layers[2].weight - weight
    conv2d = torch.nn.functional.conv2d
    expected = conv2d(conv2d(conv2d(x, down), mid, padding=1), up)
    torch.testing.assert_close(conv2d(x, changed, padding=1), expected, atol=1e-4, rtol=1e-4)


def test_a_linear_layer_in_a_file_fits_a_convolution_of_one_pixel(write: Write) -> None:
    name = "lora_unet_mid_block_attentions_0_proj_in"
    a, b = pair(inside=(32,), out=32)
    model = sd1()
    apply_lora(*model, write({f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}))
    bake(*model)
    assert model[0].network.middle_block[1].proj_in.weight.shape == (32, 32, 1, 1)


@pytest.mark.parametrize("build", [sd1, sdxl])
def test_merged_equals_unmerged_and_can_be_undone(build: Callable[[], Model], made: Callable[..., Path]) -> None:
    model = build()
    encoder = model[1].conditioners[1] if build is sdxl else model[1]
    plain, plain_text = output(model), encoder.encode_ids(ids()).context
    apply_lora(*model, made(build, "one.safetensors"), scale=0.7)
    changed, changed_text = output(model), encoder.encode_ids(ids()).context
    assert (changed - plain).abs().max() > 0.1
    merge(*model)
    torch.testing.assert_close(output(model), changed, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encoder.encode_ids(ids()).context, changed_text, atol=1e-5, rtol=1e-5)
    unmerge(*model)
    torch.testing.assert_close(output(model), changed, atol=1e-5, rtol=1e-5)
    set_scale(*model, "lora_0", 0.0)
    torch.testing.assert_close(output(model), plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encoder.encode_ids(ids()).context, plain_text, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("build", [sd1, sdxl])
def test_baking_leaves_a_plain_model(build: Callable[[], Model], made: Callable[..., Path]) -> None:
    model = build()
    names = {*model[0].state_dict(), *model[1].state_dict()}
    apply_lora(*model, made(build, "one.safetensors"))
    changed = output(model)
    bake(*model)
    assert {*model[0].state_dict(), *model[1].state_dict()} == names
    torch.testing.assert_close(output(model), changed, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("build", [sd1, sdxl])
def test_several_loras_add_up_each_with_its_scale(build: Callable[[], Model], made: Callable[..., Path]) -> None:
    first, second = (made(build, f"{seed}.safetensors", seed=seed) for seed in (1, 2))
    both, alone = build(), build()
    apply_lora(*both, first, scale=0.5)
    apply_lora(*both, second, scale=0.25)
    assert adapters(*both) == ["lora_0", "lora_1"]
    apply_lora(*alone, first, scale=0.5)
    bake(*alone)
    apply_lora(*alone, second, scale=0.25)
    torch.testing.assert_close(output(both), output(alone), atol=1e-5, rtol=1e-5)
    set_scale(*both, "lora_0", 0.0)
    only = build()
    apply_lora(*only, second, scale=0.25)
    torch.testing.assert_close(output(both), output(only), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
@pytest.mark.parametrize("build", [sd1, sdxl])
def test_what_is_written_reads_back_the_same(build: Callable[[], Model], format: str, tmp_path: Path) -> None:
    model, again = build(), build()
    random_lora(Parts(*model))
    write_lora(*model, tmp_path / "lora.safetensors", format=format)
    apply_lora(*again, tmp_path / "lora.safetensors")
    torch.testing.assert_close(output(again), output(model), atol=1e-5, rtol=1e-5)


def test_an_applied_lora_has_nothing_to_train(made: Callable[..., Path]) -> None:
    model = sdxl()
    apply_lora(*model, made(sdxl, "one.safetensors"))
    assert not [name for part in model for name, p in part.named_parameters() if p.requires_grad]


def test_a_lora_for_another_model_is_refused_by_its_first_layer(made: Callable[..., Path]) -> None:
    path = made(sdxl, "xl.safetensors", only="text_encoder_2")
    with pytest.raises(ValueError, match=r"got .*xl\.safetensors with a layer lora_te2_.*, which this model"):
        apply_lora(*sd1(), path)


def test_a_lora_of_another_width_is_refused_by_its_shape(write: Write) -> None:
    a, b = pair(inside=(24,), out=16)
    path = write({f"{TO_Q}.lora_down.weight": a, f"{TO_Q}.lora_up.weight": b})
    with pytest.raises(ValueError, match=rf"{TO_Q} for a weight of shape \(16, 24\), expected \(16, 16\)"):
        apply_lora(*sd1(), path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{TO_Q}.hada_w1_a": torch.ones(2, 2)}, f"with {TO_Q}.hada_w1_a, expected pairs"),
        ({f"{TO_Q}.lora_down.weight": torch.ones(2, 16)}, "of down alone, expected its down and up"),
        (
            {f"{TO_Q}.lora_down.weight": torch.ones(2, 16), f"{TO_Q}.lora_up.weight": torch.ones(16, 3)},
            r"of shapes \(16, 3\) and \(2, 16\)",
        ),
        ({"model.diffusion_model.out.2.weight": torch.ones(1)}, "and whole models are not LoRA"),
    ],
)
def test_what_is_no_lora_is_refused(tensors: dict[str, Tensor], message: str, write: Write) -> None:
    with pytest.raises(ValueError, match=message):
        apply_lora(*sd1(), write(tensors))


def test_a_folder_without_a_lora_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a folder without lora\.safetensors"):
        apply_lora(*sd1(), tmp_path)


def test_wrong_names_and_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got LoRA other, expected one of none"):
        set_scale(*sd1(), "other", 1.0)
    with pytest.raises(ValueError, match="got format=pickle, expected one of kohya, diffusers"):
        write_lora(*sd1(), tmp_path / "x", format="pickle")
    with pytest.raises(ValueError, match="got a model with LoRAs none"):
        write_lora(*sd1(), tmp_path / "x")
