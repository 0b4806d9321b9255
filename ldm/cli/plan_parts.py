"""A training step's parts, built on the meta device from an experiment's config alone: no weights, no data."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from ldm.cli.chain import plan as links_of
from ldm.cli.compose import conf_folder
from ldm.cli.errors import UserError, did_you_mean, user_mistakes
from ldm.conditioners.tokenizers import Tokenizer

# What `${result:NAME}` becomes while planning: a run that need not be there.
RESULT = re.compile(r"<result of (\w+)>")
# Published text towers, by what their names hold: width, layers, heads.
OPEN_CLIP = {"bigg": (1280, 32, 20), "vit-h": (1024, 24, 16), "vit-l": (768, 12, 12)}
PRETRAINED = {
    "ldm.conditioners.CLIPText.load": "ldm.conditioners.CLIPText",
    "ldm.conditioners.T5Text.load": "ldm.conditioners.T5Text",
    "ldm.conditioners.OpenCLIPText.load": "ldm.conditioners.OpenCLIPText",
}
FIRST_STAGE = "ldm.autoencoders.Autoencoder.load"


class AnyTokenizer(Tokenizer):
    """Stands in for a tokenizer whose files are not needed: every caption has all tokens.

    Args:
        length: of captions, in tokens.
    """

    vocabulary_size = 1

    def __init__(self, length: int = 77) -> None:
        self.length = length

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(ids, mask), each (B, length)."""
        shape = (len(captions), self.length)
        return torch.zeros(shape, dtype=torch.int64), torch.ones(shape, dtype=torch.bool)


def plain(config: DictConfig, key: str) -> Any:
    """A node as plain values; results of runs that were not made yet stay names.

    Raises:
        UserError: it cannot be resolved.
    """
    OmegaConf.register_new_resolver("result", lambda name: f"<result of {name}>", replace=True)
    node = OmegaConf.select(config, key)
    with user_mistakes():
        return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def untrained(node: Any) -> Any:
    """A node whose pretrained parts are replaced by the same geometry without weights.

    Raises:
        UserError: a geometry is not known.
    """
    if isinstance(node, list):
        return [untrained(item) for item in node]
    if not isinstance(node, dict):
        return node
    target = str(node.get("_target_", ""))
    if target in PRETRAINED:
        return _text_encoder(node, target)
    if target.endswith("Tokenizer") and "path" in node:
        return {"_target_": "ldm.cli.plan_parts.AnyTokenizer", "length": node.get("length") or 77}
    if target.endswith("LPIPS"):
        return {**node, "weights_path": None}
    return {key: untrained(value) for key, value in node.items()}


def first_stage_node(config: DictConfig) -> dict[str, Any]:
    """The autoencoder's geometry: of the config, of the run that trains it, of the file, or by the file's name.

    Raises:
        UserError: none of these knows it.
    """
    node = plain(config, "model.autoencoder")
    if node.get("_target_") != FIRST_STAGE:
        # Another geometry, chosen to plan with, may stand where an experiment says from where to load one.
        return {key: value for key, value in node.items() if key != "path"}
    path = str(node["path"])
    named = OmegaConf.select(config, "card.first_stage")
    if found := RESULT.match(path):
        for link in links_of(config):
            if link.config.get("name") == found[1] and "autoencoder" in link.config:
                return dict(plain(link.config, "autoencoder"))
    if Path(path).is_file():
        return _geometry_of_file(Path(path))
    folder = conf_folder() / "autoencoder"
    names = [file.stem for file in sorted(folder.glob("*.yaml")) if file.stem != "trained"]
    # The finetuned decoders of Stable Diffusion, sd_vae_ft_ema and sd_vae_ft_mse, have its geometry.
    stem = named or ("sd" if Path(path).stem.startswith("sd_vae") else Path(path).stem)
    if stem in names:
        return dict(yaml.safe_load((folder / f"{stem}.yaml").read_text()))
    hint = did_you_mean(stem, names)
    raise UserError(
        f"autoencoder.path: got {path}, where there is no file, expected one, or a geometry to plan with: "
        f"autoencoder=NAME, one of {', '.join(names)}{hint}"
    )


def _geometry_of_file(path: Path) -> dict[str, Any]:
    import json

    from safetensors import safe_open

    with user_mistakes(), safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if "target" not in metadata:
        raise UserError(f"autoencoder.path: got {path}, expected a file that ldm wrote, which says its geometry")
    return {"_target_": metadata["target"], **json.loads(metadata["config"])}


def build_on_meta(node: Any) -> Any:
    """Builds a node on the meta device.

    Raises:
        UserError: a setting is wrong.
    """
    # What modules make when they are imported has values.
    import ldm.training  # noqa: F401

    with user_mistakes(), torch.device("meta"):
        return instantiate(untrained(node), _convert_="all")


def build_first_stage(config: DictConfig) -> Any:
    """The autoencoder on the meta device; it takes any picture, since no value can be looked at there."""
    autoencoder = build_on_meta(first_stage_node(config)).requires_grad_(False).eval()
    object.__setattr__(autoencoder, "check_images", lambda images: None)
    return autoencoder


def autoencoder_module(config: DictConfig) -> Any:
    """The module that trains an autoencoder, on the meta device and with its discriminator active.

    Raises:
        UserError: a setting is wrong.
    """
    node = plain(config, "model")
    module = build_on_meta({key: value for key, value in node.items() if key != "perceptual"})
    autoencoder = module.autoencoder
    object.__setattr__(autoencoder, "check_images", lambda images: None)

    def sampled(images: Tensor, positions: Tensor) -> Any:
        noise = torch.empty(len(images), *autoencoder.latent_shape(images), device="meta")
        return autoencoder(images, noise=noise)

    nothing = lambda *_, **__: None  # noqa: E731
    for name, function in {"reconstruct_sampled": sampled, "log": nothing, "log_dict": nothing}.items():
        object.__setattr__(module, name, function)
    module.num_steps = module.adversarial_start
    return module


def built_fake(node: Any) -> Any:
    """A conditioner in the FakeTensorMode that is active: tokenizers and masks work in it, on shapes alone.

    Raises:
        UserError: a setting is wrong.
    """
    with user_mistakes():
        conditioner = instantiate(untrained(node), _convert_="all")
    if hasattr(conditioner, "check_boxes"):
        # Boxes of which only the shape is known have no class to look at.
        object.__setattr__(conditioner, "check_boxes", lambda boxes: None)
    return conditioner


def batch_of(size: int, *, resolution: int, columns: Sequence[str], tensor: Callable[..., Tensor]) -> dict[str, Any]:
    """A batch with every key that a conditioner might read."""
    small = max(1, resolution // 4)
    numbers = {column: tensor(size, dtype=torch.int64) for column in columns}
    return {
        "caption": [""] * size,
        "image": tensor(size, 3, resolution, resolution),
        "mask": tensor(size, 1, resolution, resolution),
        "low_res": tensor(size, 3, small, small),
        "depth": tensor(size, 1, resolution, resolution),
        "classes": tensor(size, 1, resolution, resolution),
        "boxes": tensor(size, 30, 5),
        "position": tensor(size, dtype=torch.int64),
        "index": tensor(size, dtype=torch.int64),
        **numbers,
    }


def num_trained(module: nn.Module) -> list[int]:
    """Elements of each parameter that is trained."""
    return [parameter.numel() for parameter in module.parameters() if parameter.requires_grad]


def num_frozen(module: nn.Module) -> int:
    """Elements of all parameters that are not."""
    return sum(parameter.numel() for parameter in module.parameters() if not parameter.requires_grad)


def _text_encoder(node: dict[str, Any], target: str) -> dict[str, Any]:
    path = str(node.get("path", ""))
    rest = {key: value for key, value in node.items() if key not in ("_target_", "path", "tokenizer_path", "length")}
    new: dict[str, Any] = {"_target_": PRETRAINED[target], **rest}
    if target.startswith("ldm.conditioners.T5Text"):
        new["tokenizer"] = {"_target_": "ldm.cli.plan_parts.AnyTokenizer", "length": node.get("length") or 77}
    if target.startswith("ldm.conditioners.OpenCLIPText"):
        sizes = next((sizes for name, sizes in OPEN_CLIP.items() if name in path.lower()), None)
        if sizes is None:
            raise UserError(
                f"conditioner.path: got {path}, whose name tells no size, expected one with ViT-H, ViT-L or bigG; "
                "set conditioner=openclip_h to plan with that"
            )
        new |= dict(zip(("width", "layers", "heads"), sizes, strict=True))
    return new
