"""`+scale=tiny`: an experiment's networks made small, and whatever would be read from files made at random."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from ldm.cli.errors import UserError

WIDTH, STEPS = 32, 4
WORDS = {"_target_": "ldm.conditioners.WordTokenizer", "words": ["a", "square", "on", "red", "green", "blue", "yellow"]}
TOKENIZER = {**WORDS, "length": 16}
CLIP = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": WIDTH,
}
T5 = {"d_model": WIDTH, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
# Pixels a side of latents at least, of pictures at least, and of pictures that an autoencoder is trained on.
LATENTS, SMALLEST, PICTURES = 4, 8, 64
DATASET = "shard dataset=tiny"
JOINED = ("ldm.conditioners.Combined", "ldm.conditioners.Stacked")

Node = dict[str, Any]
Dims = tuple[int, int]


def shrink(config: DictConfig) -> None:
    """Makes a composed training config small, in place.

    Raises:
        UserError: it is no paper's experiment, or has a part that nobody knows how to make small.
    """
    if config.get("scale") != "tiny":
        raise UserError(f"scale: got {config.get('scale')}, expected tiny")
    if config.get("card") is None:
        raise UserError(f"scale: got tiny for {config.get('name')}, expected an experiment with a paper card")
    with open_dict(config):
        config.requires = [DATASET, *(line for line in config.get("requires") or [] if line.startswith("train "))]
        config.perceptual = None
        config.autoencoder = small_autoencoder(plain(config.autoencoder), geometry=config.card.get("first_stage"))
        if config.get("network") is None:
            _shrink_autoencoder_training(config)
        else:
            _shrink_diffusion(config)


def _shrink_autoencoder_training(config: DictConfig) -> None:
    config.data.resolution = PICTURES
    config.model.adversarial_start = min(config.model.adversarial_start, 1)
    config.discriminator.base_channels, config.discriminator.num_layers = 8, 2


def _shrink_diffusion(config: DictConfig) -> None:
    config.conditioner = small_conditioner(plain(config.conditioner))
    network = plain(config.network)
    target = network["_target_"]
    if target not in NETWORKS:
        raise UserError(f"scale: got tiny for {target}, which ldm.cli.tiny.NETWORKS does not know; add it there")
    NETWORKS[target](network, widths(plain(config.conditioner)))
    factor = downsampling_of(config)
    side = max(LATENTS, reduction_of(network), SMALLEST // factor)
    if "image_size" in network:
        network["image_size"] = side
    config.network = network
    config.data.resolution = factor * side
    if "sampling" in config.model:
        config.model.sampling.num_steps = STEPS
        config.model.sampling.image_size = config.data.resolution


def plain(node: Any) -> Node:
    """A node as plain containers, its interpolations as they stand."""
    found = OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else node
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def small_autoencoder(node: Node, *, geometry: str | None) -> Node:
    """An autoencoder of as many channels and the same factor; the result of a chain's link stays one.

    Args:
        geometry: option of conf/autoencoder with the geometry of weights that are only loaded.
    """
    target = str(node["_target_"])
    if target.endswith(".load"):
        if "${result:" in str(node.get("path")):
            return node
        node = named_autoencoder(geometry, node)
    if "base_channels" in node or "channel_mult" in node:
        node = {**node, "base_channels": 16, "norm_groups": 8, "num_res_blocks": 1}
        node["channel_mult"] = [min(mult, 2) for mult in node.get("channel_mult") or (1, 2, 4, 4)]
    if "num_codes" in node:
        node["num_codes"] = min(node["num_codes"], 64)
    return node


def named_autoencoder(geometry: str | None, node: Mapping[str, Any]) -> Node:
    """The node of an option of conf/autoencoder.

    Raises:
        UserError: no option is given.
    """
    from ldm.cli.compose import compose_command

    if geometry is None:
        raise UserError(f"autoencoder.path: got {node.get('path')}, expected card.first_stage to say its geometry")
    return plain(compose_command("train", ["~experiment", f"autoencoder={geometry}"]).autoencoder)


def downsampling_of(config: DictConfig) -> int:
    """How many times smaller latents are than pictures."""
    from ldm.cli.cards import card_names
    from ldm.cli.compose import compose_command
    from ldm.cli.meta import run_name

    node = plain(config.autoencoder)
    if str(node["_target_"]).endswith("IdentityAutoencoder"):
        return 1
    if str(node["_target_"]).endswith(".load"):
        name = str(node["path"]).partition("${result:")[2].partition("}")[0]
        experiment = next(one for one in card_names() if run_name(one) == name)
        node = plain(compose_command("train", [f"experiment={experiment}"]).autoencoder)
    return int(2 ** (len(node.get("channel_mult") or (1, 2, 4, 4)) - 1))


def small_conditioner(node: Node) -> Node:
    """A conditioner of the same kind, with few small layers and no file."""
    target = str(node["_target_"])
    if target == "ldm.conditioners.PrecomputedText":
        return small_conditioner(encoders_of(node))
    if target in JOINED:
        return {**node, "conditioners": [small_conditioner(one) for one in node["conditioners"]]}
    if target not in CONDITIONERS:
        return node
    kept = {key: value for key, value in node.items() if key not in ("path", "tokenizer_path", "tokenizer", "length")}
    made = {**kept, "_target_": target.removesuffix(".load"), **CONDITIONERS[target]}
    if made["_target_"] == "ldm.conditioners.CLIPText" and made.get("layer") is not None:
        made["layer"] = 1
    return made


def encoders_of(node: Mapping[str, Any]) -> Node:
    """The encoders whose embeddings a `PrecomputedText` reads, as one conditioner."""
    encoders = node["encoder"] if isinstance(node["encoder"], list) else [node["encoder"]]
    whole = [{key: value for key, value in one.items() if key != "_partial_"} for one in encoders]
    return whole[0] if len(whole) == 1 else {"_target_": "ldm.conditioners.Combined", "conditioners": whole}


CONDITIONERS: dict[str, Node] = {
    "ldm.conditioners.CLIPText.load": {"config": CLIP},
    "ldm.conditioners.OpenCLIPText.load": {"width": WIDTH, "layers": 2, "heads": 2},
    "ldm.conditioners.T5Text.load": {"config": T5, "tokenizer": TOKENIZER},
    "ldm.conditioners.BERTText": {
        "width": WIDTH,
        "depth": 1,
        "tokenizer": TOKENIZER,
        "vocabulary_size": 32,
        "length": 16,
        "heads": 2,
        "head_dim": 8,
    },
    "ldm.conditioners.TextTransformer": {"width": WIDTH, "depth": 1, "num_heads": 2, "tokenizer": TOKENIZER},
    "ldm.conditioners.Layout": {"width": WIDTH, "depth": 1, "heads": 2, "head_dim": 8},
    "ldm.conditioners.ClassLabel": {"width": WIDTH},
    "ldm.conditioners.SizeCrop": {"dim": 16},
    "ldm.conditioners.NoisyEmbedding": {"dim": 4},
}


def widths(node: Mapping[str, Any]) -> Dims:
    """(width of the context, of the vector) that a small conditioner gives; 0 for none."""
    target = str(node["_target_"])
    if target in JOINED:
        parts = [widths(one) for one in node["conditioners"]]
        # Side by side, or one after another at the width of the widest.
        joined = sum if target == "ldm.conditioners.Combined" else max
        return joined(part[0] for part in parts), sum(part[1] for part in parts)
    if target == "ldm.conditioners.SizeCrop":
        return 0, node["dim"] * len(node["columns"])
    if target == "ldm.conditioners.NoisyEmbedding":
        return 0, 2 * node["dim"]
    if target in ("ldm.conditioners.CLIPText", "ldm.conditioners.OpenCLIPText"):
        return WIDTH, WIDTH if node.get("pooled") else 0
    return (WIDTH if f"{target}.load" in CONDITIONERS or target in CONDITIONERS else 0), 0


def small_unet(node: Node, dims: Dims) -> None:
    """A U-Net with as many levels and the same channels in and out."""
    levels = len(node["channel_mult"])
    node |= {"model_channels": WIDTH, "num_res_blocks": 1, "norm_groups": 8}
    node["channel_mult"] = [min(mult, 2) for mult in node["channel_mult"]]
    if node.get("stem_channels") is not None:
        node["stem_channels"] = WIDTH
    if node.get("num_heads") is not None:
        node["num_heads"] = min(node["num_heads"], 2)
    else:
        node["num_head_channels"] = 16
    if node.get("transformer_depth") is not None:
        node["transformer_depth"] = [1] * levels if isinstance(node["transformer_depth"], list) else 1
    _told(node, dims)


def small_transformer(node: Node, dims: Dims) -> None:
    """A DiT or MMDiT with the same patches."""
    node |= {"width": WIDTH, "depth": 2, "num_heads": 2}
    if node.get("self_attention_blocks"):
        node["self_attention_blocks"] = 1
    _told(node, dims)


def small_micro_dit(node: Node, dims: Dims) -> None:
    """A MicroDiT with the same patches, whose mixer has experts."""
    node |= {"width": WIDTH, "depth": 2, "head_width": 16, "mixer_width": WIDTH, "mixer_depth": 2}
    _told(node, dims)


def small_edm_unet(node: Node, dims: Dims) -> None:
    """A U-Net of EDM or EDM2 with as many levels."""
    node |= {"model_channels": WIDTH, "num_res_blocks": 1}
    node["channel_mult"] = [min(mult, 2) for mult in node["channel_mult"]]
    for name in ("time_channels", "uncertainty_channels", "num_head_channels"):
        if node.get(name) is not None:
            node[name] = 16


def _told(node: Node, dims: Dims) -> None:
    """Widths of what a network is told, where it is told any."""
    for name, dim in zip(("context_dim", "vector_dim"), dims, strict=True):
        if node.get(name) is not None:
            node[name] = dim


NETWORKS: dict[str, Callable[[Node, Dims], None]] = {
    "ldm.networks.UNet": small_unet,
    "ldm.networks.ADMUNet": small_unet,
    "ldm.networks.NoisyClassifier": small_unet,
    "ldm.networks.DiT": small_transformer,
    "ldm.networks.MMDiT": small_transformer,
    "ldm.networks.MicroDiT": small_micro_dit,
    "ldm.networks.EDMUNet": small_edm_unet,
    "ldm.networks.EDM2UNet": small_edm_unet,
}


def reduction_of(network: Mapping[str, Any]) -> int:
    """What a network divides the sides of its input by."""
    if network.get("channel_mult"):
        return int(2 ** (len(network["channel_mult"]) - 1))
    return int(network.get("patch_size") or 1)
