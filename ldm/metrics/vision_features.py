"""Feature networks other than Inception: torchvision's classifiers and DINOv2."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ldm.metrics.features import quantize
from ldm.metrics.preprocessing import resizer
from ldm.metrics.weights import find_weights, hugging_face_file, load_strictly, read_weights, sha256_of, torch_hub_file

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# DINOv2 sizes by timm's name: what their files are called at Meta.
DINOV2_FILES = {
    "vit_small_patch14_dinov2": "dinov2_vits14_pretrain.pth",
    "vit_base_patch14_dinov2": "dinov2_vitb14_pretrain.pth",
    "vit_large_patch14_dinov2": "dinov2_vitl14_pretrain.pth",
    "vit_giant_patch14_dinov2": "dinov2_vitg14_pretrain.pth",
}


def normalized(images: Tensor, size: int, resize: str) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] to ImageNet-normalised ones (B, 3, size, size)."""
    pixels = resizer(resize)(quantize(images).float(), size) / 255
    mean, std = (pixels.new_tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels - mean) / std


class TorchvisionFeatures(nn.Module):
    """One layer of a torchvision classifier, averaged over places where it is a map.

    Args:
        weights_path: the weights file (.pth or .safetensors). None looks for torchvision's default weights in
            torch.hub's cache; nothing is ever downloaded.
        model: name in torchvision.models, e.g. "inception_v3", "vgg16", "resnet50".
        layer: node of its graph, e.g. "flatten" (Inception: 2048), "classifier.4" (VGG16's second layer of 4096, as
            in improved precision and recall), "fc" (logits).
        image_size: side that images are resized to.
        resize: filter for that.

    Raises:
        FileNotFoundError: no weights; the message names file, source and option.
        ValueError: a model or resizing that there is not, or weights that do not fit.
    """

    def __init__(
        self,
        weights_path: Path | str | None = None,
        *,
        model: str = "inception_v3",
        layer: str = "flatten",
        image_size: int = 299,
        resize: str = "bilinear",
    ) -> None:
        super().__init__()
        from torchvision.models.feature_extraction import create_feature_extractor  # type: ignore[import-untyped]

        resizer(resize)
        path = _torchvision_weights(model, weights_path)
        network = _torchvision_network(model)
        load_strictly(network, read_weights(path), path, option="weights_path")
        graph = create_feature_extractor(network.eval(), {layer: "features"}, suppress_diff_warning=True)
        self.network = graph.requires_grad_(False)
        self.image_size, self.resize, self.model, self.layer = image_size, resize, model, layer
        self.weights, self.sha256 = path.name, sha256_of(path)
        with torch.no_grad():
            self.num_features = self(torch.zeros(1, 3, image_size, image_size)).shape[1]

    def describe(self) -> dict[str, Any]:
        """What goes into the protocol."""
        return {
            "network": f"torchvision {self.model}",
            "output": self.layer,
            "resize": f"{self.resize} {self.image_size}",
            "weights": self.weights,
            "sha256": self.sha256,
        }

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, num_features) of images (B, 3, H, W) in [-1, 1], of any size."""
        features = self.network(normalized(images, self.image_size, self.resize))["features"]
        return features.mean((2, 3)) if features.dim() == 4 else features


def _torchvision_network(model: str) -> nn.Module:
    from torchvision import models  # type: ignore[import-untyped]

    # These two turn ImageNet's normalisation into their own only when told.
    options = {"transform_input": True, "init_weights": False} if model in ("inception_v3", "googlenet") else {}
    return models.get_model(model, weights=None, **options)


def _torchvision_weights(model: str, weights_path: Path | str | None) -> Path:
    from torchvision import models

    if model not in models.list_models():
        raise ValueError(f"got model={model!r}, expected a name from torchvision.models.list_models()")
    url = models.get_model_weights(model).DEFAULT.url
    cached = [torch_hub_file(PurePosixPath(url).name)]
    return find_weights(weights_path, cached=cached, what=f"torchvision {model}", source=url, option="weights_path")


class DINOv2Features(nn.Module):
    """The class token of DINOv2, whose Fréchet distance is FD-DINOv2 (with timm's implementation of the network).

    The position embedding of 37 x 37 patches is resampled to the image's as the published network does, with its
    offset of 0.1 and without antialiasing; timm's own resampling differs.

    Args:
        weights_path: Meta's or timm's file. None looks for them in the caches of torch.hub and Hugging Face; nothing
            is ever downloaded.
        model: timm's name; FD-DINOv2 is published for the large one.
        image_size: a multiple of the patch size, 14.
        resize: filter to that size.

    Raises:
        FileNotFoundError: no weights; the message names file, source and option.
        ValueError: a model, size or resizing that there is not, or weights that do not fit.

    Source: Oquab et al. 2023; as a metric's features Stein et al. 2023, at 224 pixels.
    """

    def __init__(
        self,
        weights_path: Path | str | None = None,
        *,
        model: str = "vit_large_patch14_dinov2",
        image_size: int = 224,
        resize: str = "bicubic",
    ) -> None:
        super().__init__()
        import timm

        if model not in DINOV2_FILES:
            raise ValueError(f"got model={model!r}, expected one of {', '.join(DINOV2_FILES)}")
        if image_size < 14 or image_size % 14:
            raise ValueError(f"got image_size={image_size}, expected a multiple of the patch size, 14")
        resizer(resize)
        path = _dinov2_weights(model, weights_path)
        network: Any = timm.create_model(model, pretrained=False, num_classes=0, img_size=image_size)
        state = timm_names(read_weights(path))
        if "pos_embed" in state:
            state["pos_embed"] = resample_positions(state["pos_embed"], image_size // 14)
        load_strictly(network, state, path, option="weights_path")
        self.network = network.eval().requires_grad_(False)
        self.image_size, self.resize, self.model = image_size, resize, model
        self.num_features = int(network.num_features)
        self.weights, self.sha256 = path.name, sha256_of(path)

    def describe(self) -> dict[str, Any]:
        """What goes into the protocol."""
        return {
            "network": f"timm {self.model}",
            "output": "class token",
            "resize": f"{self.resize} {self.image_size}",
            "weights": self.weights,
            "sha256": self.sha256,
        }

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, num_features) of images (B, 3, H, W) in [-1, 1], of any size."""
        return self.network(normalized(images, self.image_size, self.resize))


def _dinov2_weights(model: str, weights_path: Path | str | None) -> Path:
    name = DINOV2_FILES[model]
    repository = f"timm/{model}.lvd142m"
    return find_weights(
        weights_path,
        cached=[torch_hub_file(name), *hugging_face_file(repository, "model.safetensors")],
        what="DINOv2",
        source=f"{name} (github.com/facebookresearch/dinov2) or model.safetensors (huggingface.co/{repository})",
        option="weights_path",
    )


def timm_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Meta's names as timm's, without the mask of training; only the giant model's gated layers differ."""
    return {
        name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2."): value
        for name, value in state.items()
        if name != "mask_token"
    }


def resample_positions(embedding: Tensor, side: int) -> Tensor:
    """Position embedding (1, 1 + M * M, D) of class token and patches for side x side patches.

    Source: DINOv2's `interpolate_pos_encoding` with interpolate_offset=0.1, as its published models are built.
    """
    old = round((embedding.shape[1] - 1) ** 0.5)
    if old == side:
        return embedding
    grid = embedding[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    scale = (side + 0.1) / old
    grid = functional.interpolate(grid, scale_factor=(scale, scale), mode="bicubic", antialias=False)
    return torch.cat([embedding[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
