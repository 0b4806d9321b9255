"""CLIP models as judges: the image towers as feature networks, both towers for the CLIP score.

Both classes here embed images and texts with `embed_images` and `embed_texts`, and as feature networks give image
embeddings of length 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ldm.metrics.preprocessing import resize_and_crop, resize_like_pillow
from ldm.metrics.weights import find_weights, hugging_face_file, sha256_of

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class OpenCLIPFeatures(nn.Module):
    """Embeddings of an open_clip model.

    Args:
        weights_path: its weights. None looks for `pretrained` in the caches of Hugging Face and open_clip; nothing is
            ever downloaded.
        model: open_clip's name.
        pretrained: open_clip's tag of the weights. Pixel statistics, filter and activation go by it, also where the
            weights come from weights_path: ViT-L/14 has tags that differ in each.

    Raises:
        FileNotFoundError: no weights; the message names file, source and option.
        ValueError: a model or tag that open_clip does not know.

    Source: Radford et al. 2021. CMMD uses ViT-L/14 at 336 pixels.
    """

    def __init__(
        self,
        weights_path: Path | str | None = None,
        *,
        model: str = "ViT-L-14-336",
        pretrained: str = "openai",
    ) -> None:
        super().__init__()
        import open_clip

        settings = _open_clip_settings(model, pretrained)
        path = _open_clip_weights(model, settings, weights_path)
        network: Any = open_clip.create_model(
            model, pretrained=str(path), force_quick_gelu=settings.get("quick_gelu", False)
        )
        self.network = network.eval().requires_grad_(False)
        self.tokenizer = open_clip.get_tokenizer(model)
        size = network.visual.image_size
        self.image_size = int(size[0] if isinstance(size, tuple) else size)
        self.mean, self.std = settings.get("mean", CLIP_MEAN), settings.get("std", CLIP_STD)
        self.filter, self.fit = settings.get("interpolation", "bicubic"), settings.get("resize_mode", "shortest")
        with torch.no_grad():
            self.num_features = self(torch.zeros(1, 3, self.image_size, self.image_size)).shape[1]
        self.model, self.pretrained = model, pretrained
        self.weights, self.sha256 = path.name, sha256_of(path)

    def describe(self) -> dict[str, Any]:
        """What goes into the protocol."""
        return {
            "network": f"open_clip {self.model} {self.pretrained}",
            "resize": f"{self.filter} {self.fit} {self.image_size}",
            "weights": self.weights,
            "sha256": self.sha256,
        }

    def embed_images(self, images: Tensor) -> Tensor:
        """Embeddings (B, D) of length 1 of images (B, 3, H, W) in [-1, 1], of any size."""
        if self.fit == "squash":
            pixels = resize_like_pillow(images, (self.image_size, self.image_size), self.filter)
        else:
            pixels = resize_and_crop(images, self.image_size, self.filter)
        return self.network.encode_image(normalized(pixels, self.mean, self.std), normalize=True)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (B, D) of length 1; what goes beyond the tokenizer's length is cut."""
        device = next(self.network.parameters()).device
        return self.network.encode_text(self.tokenizer(list(texts)).to(device), normalize=True)

    def forward(self, images: Tensor) -> Tensor:
        """`embed_images`."""
        return self.embed_images(images)


def _open_clip_settings(model: str, pretrained: str) -> dict[str, Any]:
    import open_clip

    if model not in open_clip.list_models():
        raise ValueError(f"got model={model!r}, expected a name from open_clip.list_models()")
    known = open_clip.list_pretrained_tags_by_model(model)
    # A model of the user's own has no tags.
    if known and pretrained not in known:
        raise ValueError(f"got pretrained={pretrained!r}, expected one of {', '.join(known)}")
    return open_clip.get_pretrained_cfg(model, pretrained)


def _open_clip_weights(model: str, settings: dict[str, Any], weights_path: Path | str | None) -> Path:
    repository, _, name = settings.get("hf_hub", "").rpartition("/")
    names = [name] if name else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    cached = [file for candidate in names for file in hugging_face_file(repository, candidate)] if repository else []
    url = settings.get("url", "")
    if url:
        cached.append(Path("~/.cache/clip").expanduser() / url.rsplit("/", 1)[1])
    source = f"{names[0]} (huggingface.co/{repository})" if repository else url or "a file of its state"
    return find_weights(weights_path, cached=cached, what=f"open_clip {model}", source=source, option="weights_path")


class TransformersCLIPFeatures(nn.Module):
    """Embeddings of a CLIP model in the format of Hugging Face transformers.

    Args:
        path: folder with the model and its tokenizer, as `save_pretrained` writes them; nothing is ever downloaded,
            so that None is an error as well.

    Raises:
        FileNotFoundError: no such folder; the message names folder, source and option.
    """

    def __init__(self, path: Path | str | None) -> None:
        super().__init__()
        from transformers import AutoTokenizer, CLIPModel

        source = "a folder such as that of huggingface.co/openai/clip-vit-large-patch14"
        folder = find_weights(path, cached=[], what="CLIP", source=source, option="path")
        network: Any = CLIPModel.from_pretrained(folder, local_files_only=True)
        self.network = network.eval().requires_grad_(False)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.image_size = int(network.config.vision_config.image_size)
        self.num_features = int(network.config.projection_dim)
        self.length = int(network.config.text_config.max_position_embeddings)
        self.weights, self.sha256 = folder.name, sha256_of(folder)

    def describe(self) -> dict[str, Any]:
        """What goes into the protocol."""
        return {"network": "transformers CLIPModel", "weights": self.weights, "sha256": self.sha256}

    def embed_images(self, images: Tensor) -> Tensor:
        """Embeddings (B, D) of length 1 of images (B, 3, H, W) in [-1, 1], of any size."""
        pixels = normalized(resize_and_crop(images, self.image_size), CLIP_MEAN, CLIP_STD)
        return _embedding(self.network.get_image_features(pixel_values=pixels))

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (B, D) of length 1; what goes beyond the model's length is cut."""
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.length, return_tensors="pt"
        ).to(self.network.device)
        return _embedding(
            self.network.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        )

    def forward(self, images: Tensor) -> Tensor:
        """`embed_images`."""
        return self.embed_images(images)


def _embedding(output: Any) -> Tensor:
    # A tensor before transformers 5, an object with the projected embedding as `pooler_output` since: torchmetrics
    # 1.9's CLIPScore breaks on it.
    embedding = output if isinstance(output, Tensor) else output.pooler_output
    return functional.normalize(embedding, dim=-1)


def normalized(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pixels (B, 3, H, W) in [0, 255] as a CLIP tower takes them."""
    center, scale = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (mean, std))
    return (pixels / 255 - center) / scale
