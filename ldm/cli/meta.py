"""A config's networks on the meta device: what they count and compute, without a weight or a file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ldm.cli.build import build
from ldm.cli.errors import UserError

# What the encoders on the hub are, which `load` finds out from their files.
VIT_H, BIG_G = {"width": 1024, "layers": 24, "heads": 16}, {"width": 1280, "layers": 32, "heads": 20}
ENCODERS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14": {},
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": VIT_H,
    "apple/DFN5B-CLIP-ViT-H-14-378": VIT_H,
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k": BIG_G,
    "google/t5-v1_1-xxl": {"tokenizer": {"_target_": "ldm.cli.plan_parts.AnyTokenizer"}},
}
# Settings of `load` that the constructor has not.
OF_FILES = ("path", "tokenizer_path", "length")
LATENTS_OF_CHAIN = re.compile(r"<result of (\w+)>")
PER_BILLION, PER_MILLION = 1e9, 1e6


@dataclass(frozen=True)
class Part:
    """What one part of a model counts.

    Args:
        parameters: of it, whether trained or not.
        codebook: entries of a codebook times their width, which `parameters` leaves out.
        multiply_adds: of one forward pass for one sample: a multiply and an add are one, element-wise work is nothing.
        steps: the same by step, where a pass is several: an autoencoder's encode and decode.
    """

    parameters: int
    codebook: int = 0
    multiply_adds: int | None = None
    steps: Mapping[str, int] = field(default_factory=dict)


def on_meta(node: Any) -> Any:
    """Builds a node on the meta device.

    Raises:
        UserError: a setting is wrong.
    """
    import torch

    with torch.device("meta"):
        return build(OmegaConf.create(node))


def without_files(node: Any) -> Any:
    """A conditioner's node whose encoders are built by geometry and not read from files.

    Raises:
        UserError: an encoder of a path that is not known.
    """
    if isinstance(node, list):
        return [without_files(one) for one in node]
    if not isinstance(node, dict):
        return node
    target = str(node.get("_target_", ""))
    if target == "ldm.conditioners.PrecomputedText":
        encoders = node["encoder"] if isinstance(node["encoder"], list) else [node["encoder"]]
        whole = [{key: value for key, value in one.items() if key != "_partial_"} for one in encoders]
        return without_files({"_target_": "ldm.conditioners.Combined", "conditioners": whole})
    if target == "ldm.conditioners.BERTText":
        # Its vocabulary is a file, and its size an argument.
        node = {**node, "tokenizer": None}
    if target.startswith("ldm.conditioners.") and target.endswith(".load"):
        path = str(node.get("path"))
        if path not in ENCODERS:
            raise UserError(f"conditioner.path: got {path}, expected one of {', '.join(ENCODERS)} to count it by name")
        kept = {key: value for key, value in node.items() if key not in OF_FILES}
        return {**kept, **ENCODERS[path], "_target_": target.removesuffix(".load")}
    return {key: without_files(value) for key, value in node.items()}


def first_stage_node(node: Mapping[str, Any], *, geometry: str | None, of_experiment: Callable[[str], Any]) -> Any:
    """The geometry of an autoencoder's node: its own, that of the experiment that trains it, or one by name.

    Args:
        geometry: an option of conf/autoencoder, for weights of which only a path is known.
        of_experiment: from a run's name to its autoencoder's node.

    Raises:
        UserError: nothing says it.
    """
    if not str(node.get("_target_", "")).endswith(".load"):
        return dict(node)
    if geometry is not None:
        from ldm.cli.compose import compose_command

        chosen = compose_command("train", ["~experiment", f"autoencoder={geometry}"]).autoencoder
        return OmegaConf.to_container(chosen, resolve=True)
    found = LATENTS_OF_CHAIN.match(str(node.get("path", "")))
    if found is None:
        raise UserError(
            f"autoencoder.path: got {node.get('path')}, of which nothing says what it holds; expected "
            "${result:NAME}/autoencoder.safetensors, or card.first_stage"
        )
    return first_stage_node(of_experiment(found[1]), geometry=None, of_experiment=of_experiment)


class Counter:
    """Counts nodes, each kind of them once."""

    def __init__(self) -> None:
        self._known: dict[str, Part] = {}

    def network(self, node: Any, *, encoder: Any, latent_channels: int, size: int, flops: bool) -> Part:
        """A network that sees latents (1, C, size, size) and what the conditioner `encoder` says."""
        return self._once(
            [node, encoder, size, flops],
            lambda: count_network(on_meta(node), encoder, latent_channels, size, flops=flops),
        )

    def encoder(self, node: Any, *, flops: bool) -> Part:
        """A conditioner."""
        return self._once([node, flops], lambda: count_encoder(on_meta(without_files(node)), flops=flops))

    def first_stage(self, node: Any, *, size: int, flops: bool) -> Part:
        """An autoencoder of images of size x size pixels."""
        return self._once([node, size, flops], lambda: count_autoencoder(on_meta(node), size, flops=flops))

    def _once(self, key: Any, count: Callable[[], Part]) -> Part:
        text = json.dumps(key, sort_keys=True, default=str)
        if text not in self._known:
            self._known[text] = count()
        return self._known[text]


def num_parameters(module: Any) -> int:
    """Parameters of a module, but for the logit scale that contrastive training left in a text encoder."""
    return sum(p.numel() for name, p in module.named_parameters() if not name.endswith("logit_scale"))


def multiply_adds(run: Callable[[], Any]) -> int:
    """The multiply-adds of a call on the meta device."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops() // 2)


def count_network(network: Any, encoder: Any, latent_channels: int, size: int, *, flops: bool) -> Part:
    """Parameters, and one forward pass of a network."""
    parameters = num_parameters(network)
    if not flops:
        return Part(parameters)
    import torch

    from ldm.networks import NoisyClassifier

    # As it samples: in training it may drop patches.
    network.eval()

    def run() -> None:
        x, t = torch.zeros(1, latent_channels, size, size), torch.zeros(1)
        if isinstance(network, NoisyClassifier):
            network(x, t)
        else:
            network(x, t, conditions(network, encoder, latent_channels, size))

    return Part(parameters, multiply_adds=multiply_adds(run))


def conditions(network: Any, encoder: Any, latent_channels: int, size: int) -> Any:
    """What a network is told of one sample, of the shapes that it takes."""
    import torch

    from ldm.diffusion import Conditioning

    arguments = network.arguments
    context_dim, length = arguments.get("context_dim"), context_length(on_meta(without_files(encoder)))
    classes = arguments.get("num_classes")
    vector_dim = arguments.get("vector_dim")
    extra = arguments.get("in_channels", latent_channels) - latent_channels
    vector = torch.zeros(1, dtype=torch.int64) if classes else torch.zeros(1, vector_dim) if vector_dim else None
    return Conditioning(
        context=torch.zeros(1, length, context_dim) if context_dim else None,
        vector=vector,
        concat=torch.zeros(1, extra, size, size) if extra else None,
    )


def context_length(conditioner: Any) -> int:
    """How many tokens a conditioner tells."""
    return max((_length(part) for part in _parts(conditioner)), default=1)


def _length(part: Any) -> int:
    tokenizer = getattr(part, "tokenizer", None)
    if tokenizer is not None:
        return int(tokenizer.length)
    transformer = getattr(getattr(part, "encoder", part), "transformer", None)
    positions = getattr(transformer, "pos_emb", None)
    return int(positions["emb"].num_embeddings) if positions is not None else 1


def count_encoder(conditioner: Any, *, flops: bool) -> Part:
    """Parameters, and the encoding of one caption."""
    parts = list(_parts(conditioner))
    parameters = sum(map(num_parameters, parts))
    return Part(parameters, multiply_adds=sum(map(_encoding, parts)) if flops else None)


def _parts(conditioner: Any) -> Iterator[Any]:
    """The conditioners that join no others."""
    if hasattr(conditioner, "conditioners"):
        for part in conditioner.conditioners:
            yield from _parts(part)
    else:
        yield conditioner


def _encoding(part: Any) -> int:
    import torch

    from ldm.conditioners import T5Text

    if not num_parameters(part):
        return 0
    part = getattr(part, "encoder", part)
    if hasattr(part, "encode_ids"):
        return multiply_adds(lambda: part.encode_ids(torch.zeros(1, _length(part), dtype=torch.int64)))
    if isinstance(part, T5Text):
        # Its null condition may be zeros, made without it.
        return multiply_adds(lambda: part.transformer(torch.zeros(1, _length(part), dtype=torch.int64)))
    if hasattr(part, "null"):
        return multiply_adds(lambda: part.null(1))
    return 0


def count_autoencoder(autoencoder: Any, size: int, *, flops: bool) -> Part:
    """Parameters without the codebook, and the way of one image there and back."""
    quantizer = getattr(autoencoder, "quantize", None)
    codebook = 0 if quantizer is None else quantizer.embedding.weight.numel()
    parameters = num_parameters(autoencoder) - codebook
    if not flops:
        return Part(parameters, codebook)
    if not hasattr(autoencoder, "encoder"):
        return Part(parameters, codebook, 0)
    import torch

    side = size // autoencoder.downsampling_factor
    # Past the checks of values, of which there are none on the meta device.
    steps = {
        "encode": lambda: autoencoder.quant_conv(autoencoder.encoder(torch.zeros(1, 3, size, size))),
        "decode": lambda: autoencoder.decoder(
            autoencoder.post_quant_conv(torch.zeros(1, autoencoder.latent_channels, side, side))
        ),
    }
    counts = {name: multiply_adds(step) for name, step in steps.items()}
    return Part(parameters, codebook, sum(counts.values()), counts)


def run_name(experiment: str) -> str:
    """The name of an experiment's runs: paper_vq_f4 of paper/vq_f4."""
    return Path(experiment).as_posix().replace("/", "_")
