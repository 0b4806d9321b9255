"""OpenCLIP text towers against open_clip and transformers."""

from pathlib import Path
from typing import Any, Literal

import huggingface_hub.constants
import open_clip
import pytest
import torch
from clip_oracles import CAPTIONS, TINY, as_transformers, open_clip_text, randomized, relative_error, transformers_ids
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from ldm.conditioners import OpenCLIPText
from ldm.conditioners.precomputed import text_sha256


@pytest.fixture(scope="module")
def whole() -> open_clip.CLIP:
    """A tiny OpenCLIP model with heads 64 wide, as all of them have."""
    vision = {"layers": 1, "width": 64, "head_width": 64, "patch_size": 16, "image_size": 32}
    text = {"width": 128, "heads": 2, "layers": 3}
    return randomized(open_clip.CLIP(96, vision, text))


def text_state(model: open_clip.CLIP) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("visual.")}


def loaded(model: open_clip.CLIP, **settings: Any) -> OpenCLIPText:
    encoder = OpenCLIPText(128, 3, 2, projection_dim=96, **settings)
    encoder.load_state_dict({f"model.{name}": tensor for name, tensor in text_state(model).items()})
    return encoder


@torch.no_grad()
def test_the_vector_is_open_clips_text_embedding(whole: open_clip.CLIP) -> None:
    cond = loaded(whole, pooled=True)({"caption": CAPTIONS})
    assert relative_error(cond.vector, whole.encode_text(open_clip.tokenize(CAPTIONS))) < 1e-5


@pytest.mark.parametrize(("layer", "index"), [("penultimate", -2), ("last", -1)])
@pytest.mark.parametrize("final_norm", [True, False])
@torch.no_grad()
def test_the_context_is_open_clips_state_of_that_layer(
    whole: open_clip.CLIP, layer: Literal["penultimate", "last"], index: int, final_norm: bool
) -> None:
    states = whole.forward_intermediates(
        text=open_clip.tokenize(CAPTIONS), normalize_intermediates=final_norm, intermediates_only=True
    )
    cond = loaded(whole, layer=layer, final_norm=final_norm)({"caption": CAPTIONS})
    assert cond.mask is None and cond.vector is None
    assert relative_error(cond.context, states["text_intermediates"][index]) < 1e-5


@torch.no_grad()
def test_quick_gelu_is_open_clips() -> None:
    text = {"width": 128, "heads": 2, "layers": 3}
    vision = {"layers": 1, "width": 64, "head_width": 64, "patch_size": 16, "image_size": 32}
    quick = randomized(open_clip.CLIP(96, vision, text, quick_gelu=True))
    expected = quick.forward_intermediates(
        text=open_clip.tokenize(CAPTIONS), normalize_intermediates=True, intermediates_only=True
    )["text_intermediates"][-1]

    assert relative_error(loaded(quick, layer="last", quick_gelu=True)({"caption": CAPTIONS}).context, expected) < 1e-5
    assert relative_error(loaded(quick, layer="last")({"caption": CAPTIONS}).context, expected) > 1e-4


def test_embeddings_made_with_quick_gelu_are_told_from_others_and_those_keep_their_hash() -> None:
    encoders = [OpenCLIPText(32, 1, 2, quick_gelu=quick) for quick in (False, True)]
    encoders[1].load_state_dict(encoders[0].state_dict())

    assert text_sha256(encoders[0]) != text_sha256(encoders[1])
    assert "quick_gelu" not in vars(encoders[0])


@torch.no_grad()
def test_stable_diffusion_2s_context_is_that_of_a_shorter_model_of_transformers() -> None:
    """In the format of diffusers the encoder lacks the last layer, and its last state is ours before the last."""
    encoder = open_clip_text()
    state = {name.removeprefix("model."): tensor for name, tensor in encoder.state_dict().items()}
    config = TINY | {"hidden_act": "gelu", "num_hidden_layers": 2, "intermediate_size": 128, "projection_dim": 32}
    shorter = CLIPTextModelWithProjection(CLIPTextConfig(**config, eos_token_id=49407)).eval()
    shorter.load_state_dict(as_transformers(state, 2))
    expected = shorter(input_ids=transformers_ids(CAPTIONS, pad_token="!")).last_hidden_state
    assert relative_error(encoder({"caption": CAPTIONS}).context, expected) < 1e-5


@torch.no_grad()
def test_sdxls_second_encoder_is_that_of_transformers() -> None:
    encoder = open_clip_text(final_norm=False, pooled=True, null="zeros")
    state = {name.removeprefix("model."): tensor for name, tensor in encoder.state_dict().items()}
    config = TINY | {"hidden_act": "gelu", "intermediate_size": 128, "projection_dim": 32}
    theirs = CLIPTextModelWithProjection(CLIPTextConfig(**config, eos_token_id=49407)).eval()
    theirs.load_state_dict(as_transformers(state, 3))
    expected = theirs(input_ids=transformers_ids(CAPTIONS, pad_token="!"), output_hidden_states=True)
    cond = encoder({"caption": CAPTIONS})
    assert relative_error(cond.context, expected.hidden_states[-2]) < 1e-5
    assert relative_error(cond.vector, expected.text_embeds) < 1e-5


def test_blocks_that_take_tokens_first_give_the_same() -> None:
    """Those of open_clip before 2.25: fed batch first, they attend across the batch without an error."""
    encoder = open_clip_text(pooled=True)
    expected = encoder({"caption": CAPTIONS}).parts()
    for block in encoder.model.transformer.resblocks:
        block.attn.batch_first = False
    assert_close(encoder({"caption": CAPTIONS}).parts(), expected)


def test_state_names_are_those_of_compvis_files() -> None:
    names = set(OpenCLIPText(32, 2, 4).state_dict())
    blocks = {name for name in names if name.startswith("model.transformer.resblocks.")}
    expected = {"positional_embedding", "text_projection", "logit_scale", "token_embedding.weight"}
    expected |= {"ln_final.weight", "ln_final.bias"}
    assert names - blocks == {f"model.{name}" for name in expected}
    assert "model.transformer.resblocks.1.attn.in_proj_weight" in blocks and len(blocks) == 2 * 12
    assert not {"model.text_projection", "model.logit_scale"} & set(
        OpenCLIPText(32, 2, 4, projection_dim=0).state_dict()
    )


def test_an_encoder_built_on_meta_and_loaded_by_assignment_encodes() -> None:
    encoder = open_clip_text(pooled=True)
    with torch.device("meta"):
        empty = OpenCLIPText(**encoder.arguments)
    empty.load_state_dict(encoder.state_dict(), assign=True)
    assert_close(empty({"caption": CAPTIONS}).parts(), encoder({"caption": CAPTIONS}).parts())


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin", "mine.pt"])
def test_a_file_of_the_whole_model_loads(whole: open_clip.CLIP, tmp_path: Path, name: str) -> None:
    save = save_file if name.endswith("safetensors") else torch.save
    save({key: tensor.half() for key, tensor in whole.state_dict().items()}, tmp_path / name)
    encoder = OpenCLIPText.load(tmp_path / name if name == "mine.pt" else tmp_path, pooled=True)
    assert {key: encoder.arguments[key] for key in ("width", "layers", "heads", "projection_dim")} == {
        "width": 128,
        "layers": 3,
        "heads": 2,
        "projection_dim": 96,
    }
    expected = whole.encode_text(open_clip.tokenize(CAPTIONS))
    assert relative_error(encoder({"caption": CAPTIONS}).vector, expected) < 0.02, "weights were rounded to half"
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in encoder.parameters())


def test_an_incomplete_file_is_refused_by_the_name_of_what_is_missing(whole: open_clip.CLIP, tmp_path: Path) -> None:
    state = text_state(whole)
    del state["transformer.resblocks.1.ln_2.bias"]
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(ValueError, match=r"got .*part\.pt, which cannot be read"):
        OpenCLIPText.load(tmp_path / "part.pt")


@pytest.mark.parametrize("content", [b"", b"not weights at all"])
@pytest.mark.parametrize("name", ["damaged.pt", "damaged.safetensors"])
def test_a_damaged_file_is_one_line_with_the_remedy(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"got .*damaged.*, which cannot be read .*expected a folder with"):
        OpenCLIPText.load(tmp_path / name)


def test_an_empty_folder_is_one_line_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the folder has no such file\), expected a folder with open_clip_model"):
        OpenCLIPText.load(tmp_path)


def test_a_hub_id_offline_is_one_line_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"got someone/clip, which cannot be read .*give a local path, or a hub id"):
        OpenCLIPText.load("someone/clip")


@pytest.mark.parametrize(
    ("name", "geometry"),
    [
        ("ViT-H-14", (1024, 24, 16)),
        ("ViT-H-14-378-quickgelu", (1024, 24, 16)),
        ("ViT-bigG-14", (1280, 32, 20)),
    ],
)
def test_the_documented_geometries_are_open_clips(name: str, geometry: tuple[int, int, int]) -> None:
    text = open_clip.get_model_config(name)["text_cfg"]
    assert geometry == (text["width"], text["layers"], text["heads"])
    assert text["width"] == 64 * text["heads"], "what a file's shapes cannot tell"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": "first"}, "got conditioner.layer=first, expected penultimate or last"),
        ({"heads": 5}, "got conditioner.width=32, expected a multiple of heads=5"),
        ({"pooled": True, "projection_dim": 0}, "expected a projection to pool with"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OpenCLIPText(**({"width": 32, "layers": 2, "heads": 4} | settings))
