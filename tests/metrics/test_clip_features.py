import json

import open_clip
import pytest
import torch
from metric_helpers import images
from PIL import Image
from torch.testing import assert_close
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from ldm.metrics import CLIPScore, OpenCLIPFeatures, TransformersCLIPFeatures, as_seen, quantize
from ldm.metrics.clip import CLIP_MEAN, CLIP_STD
from ldm.metrics.weights import sha256_of

GEOMETRY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def tiny_open_clip(tmp_path_factory):
    """Name and weights file of a tiny open_clip model with random weights."""
    folder = tmp_path_factory.mktemp("open_clip")
    (folder / "ViT-tiny-test.json").write_text(json.dumps(GEOMETRY))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    path = folder / "open_clip_pytorch_model.bin"
    torch.save(open_clip.create_model("ViT-tiny-test").state_dict(), path)
    return "ViT-tiny-test", path


@pytest.fixture(scope="module")
def tiny_clip_folder(tmp_path_factory):
    """Folder of a tiny transformers model with random weights, and a tokenizer of single letters."""
    folder = tmp_path_factory.mktemp("clip")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    letters = [letter + end for end in ("", "</w>") for letter in "abcdefgh"]
    vocabulary = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    text = small | {
        "vocab_size": len(vocabulary),
        "max_position_embeddings": 8,
        "eos_token_id": vocabulary["<|endoftext|>"],
    }
    config = CLIPConfig(text_config=text, vision_config=small | {"image_size": 32, "patch_size": 8}, projection_dim=12)
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_open_clip_embeds_images_as_its_own_pipeline(tiny_open_clip) -> None:
    name, path = tiny_open_clip
    model, _, prepare = open_clip.create_model_and_transforms(name, pretrained=str(path))
    features = OpenCLIPFeatures(path, model=name)
    pictures = images(2, side=48)
    pil = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in quantize(pictures)]
    expected = model.eval().encode_image(torch.stack([prepare(picture) for picture in pil]), normalize=True)
    found = features(pictures)
    assert_close(found, expected, rtol=0, atol=2e-3)
    assert_close(found.norm(dim=1), torch.ones(2))
    assert features.num_features == 16


@torch.no_grad()
def test_open_clip_embeds_texts_as_its_own_tower(tiny_open_clip) -> None:
    name, path = tiny_open_clip
    model = open_clip.create_model(name, pretrained=str(path)).eval()
    texts = ["a red cube", "a very long prompt " * 40]
    expected = model.encode_text(open_clip.tokenize(texts), normalize=True)
    assert_close(OpenCLIPFeatures(path, model=name).embed_texts(texts), expected)


@torch.no_grad()
@pytest.mark.parametrize("tag", ["openai", "laion2b_s32b_b82k"])
def test_a_file_is_prepared_for_as_its_tag_says(tag, tiny_open_clip, monkeypatch) -> None:
    # ViT-L/14's tags differ in pixel statistics and activation; without them a local file would be read wrongly.
    name, path = tiny_open_clip
    settings = open_clip.get_pretrained_cfg("ViT-L-14", tag) | {"resize_mode": "squash"}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda model, pretrained: settings)
    features = OpenCLIPFeatures(path, model=name, pretrained=tag)
    model, _, prepare = open_clip.create_model_and_transforms(
        name,
        pretrained=str(path),
        force_quick_gelu=tag == "openai",
        image_mean=settings["mean"],
        image_std=settings["std"],
        image_resize_mode="squash",
    )
    pictures = images(1, side=48)[:, :, :40]
    pil = Image.fromarray(quantize(pictures)[0].permute(1, 2, 0).numpy())
    assert_close(features(pictures), model.eval().encode_image(prepare(pil)[None], normalize=True), rtol=0, atol=2e-3)


def test_open_clip_weights_are_known_by_their_hash(tiny_open_clip) -> None:
    name, path = tiny_open_clip
    assert OpenCLIPFeatures(path, model=name).describe() == {
        "network": f"open_clip {name} openai",
        "resize": "bicubic shortest 32",
        "weights": path.name,
        "sha256": sha256_of(path),
    }


@torch.no_grad()
def test_transformers_five_embeds_as_its_own_forward(tiny_clip_folder) -> None:
    # get_image_features returns an object since transformers 5: torchmetrics 1.9's CLIPScore breaks on it.
    features = TransformersCLIPFeatures(tiny_clip_folder)
    pictures, texts = images(2, side=32), ["abc", "hgfedcba hgfedcba"]
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (CLIP_MEAN, CLIP_STD))
    tokens = features.tokenizer(texts, padding=True, truncation=True, max_length=8, return_tensors="pt")
    expected = features.network(
        input_ids=tokens["input_ids"],
        attention_mask=tokens["attention_mask"],
        pixel_values=(quantize(pictures) / 255 - mean) / std,
    )
    assert_close(features(pictures), expected.image_embeds)
    assert_close(features.embed_texts(texts), expected.text_embeds)
    assert features.num_features == 12


@torch.no_grad()
@pytest.mark.parametrize("library", ["open_clip", "transformers"])
def test_the_score_of_a_real_model_is_its_mean_cosine(library, tiny_open_clip, tiny_clip_folder) -> None:
    name, path = tiny_open_clip
    judge = OpenCLIPFeatures(path, model=name) if library == "open_clip" else TransformersCLIPFeatures(tiny_clip_folder)
    metric = CLIPScore(judge)
    pictures, prompts = images(4, side=32), ["a", "b", "a b", "h"]
    metric.update(pictures, prompts)
    cosines = (judge.embed_images(as_seen(pictures)).double() * judge.embed_texts(prompts).double()).sum(dim=1)
    assert_close(metric.compute(), 100 * cosines.mean())


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: OpenCLIPFeatures(), ("huggingface.co/timm/vit_large_patch14_clip_336.openai", "weights_path")),
        (lambda: OpenCLIPFeatures("no.bin"), ("no.bin", "weights_path")),
        (lambda: TransformersCLIPFeatures(None), ("in any cache", "huggingface.co/openai", "path")),
        (lambda: TransformersCLIPFeatures("no"), ("no", "huggingface.co/openai", "path")),
    ],
)
def test_missing_weights_name_file_source_and_option(build, words, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        build()
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"model": "ViT-X"}, "got model='ViT-X'"), ({"pretrained": "nobody"}, "got pretrained='nobody', expected one of")],
)
def test_unknown_models_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        OpenCLIPFeatures(**options)
