"""Conditioners of published models: recognised in CompVis files, built, and named as those files name them.

The kinds: "clip" (SD 1), "open_clip" (SD 2), "sdxl" and "refiner", "bert" (LDM's text models), "class" (LDM's
ImageNet), and None, no conditioner at all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.conditioners import (
    BERTText,
    ClassLabel,
    CLIPText,
    Combined,
    Conditioner,
    OpenCLIPText,
    SizeCrop,
    Unconditional,
    WordPieceTokenizer,
)
from ldm.conditioners.open_clip import open_clip_geometry
from ldm.conditioners.size_crop import SDXL, SDXL_REFINER
from ldm.interop.model import CarriedConditioner, arguments_of, fill
from ldm.interop.text_encoders import HEAD_WIDTH, NOT_READ, clip_config, num_layers, without_prefix


@dataclass(frozen=True)
class TextPart:
    """One encoder of a conditioner.

    Args:
        kind: clip, open_clip, bert, class, or unknown.
        state: its tensors under CompVis names without prefix.
        settings: arguments of its conditioner that are neither told by shapes nor those of the kind.
    """

    kind: str
    state: Mapping[str, Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)


_PLACE = re.compile(r"(?:cond_stage_model|conditioner\.embedders\.(\d+))\.(.+)")
# Heads of text encoders that fine-tuning tools leave in files of models without pooling.
_CLIP_EXTRAS = rf"transformer\.({NOT_READ.pattern}|text_projection(\.weight)?)|({NOT_READ.pattern})|text_projection"
_OPEN_CLIP_EXTRAS = rf"model\.({NOT_READ.pattern})"


def text_parts(state: Mapping[str, Tensor]) -> list[TextPart]:
    """The text encoders of a CompVis or Stability file in their order.

    The first stage that inpainting_big holds a second time in this place is left out.
    """
    groups: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if place := _PLACE.fullmatch(name):
            groups.setdefault(int(place[1] or 0), {})[place[2]] = tensor
    parts = [TextPart(_part_kind(groups[index]), groups[index]) for index in sorted(groups)]
    return [part for part in parts if part.kind != "first stage"]


def text_kind(parts: Sequence[TextPart], *, has_vector: bool) -> str | None:
    """The kind of conditioner that encoders make together."""
    kinds = [part.kind for part in parts]
    if kinds in (["clip", "open_clip"], ["clip", "clip"]):
        return "sdxl"
    if kinds == ["open_clip"] and has_vector:
        return "refiner"
    return kinds[0] if len(kinds) == 1 else "+".join(kinds) or None


def build_conditioner(
    kind: str | None, parts: Sequence[TextPart], *, vector_dim: int | None, image_size: int, zero_null: bool = True
) -> Conditioner:
    """The conditioner of a kind with the weights of its encoders.

    Args:
        vector_dim: width of the network's vector condition.
        image_size: pixels that the model was trained for.
        zero_null: of "sdxl", whether zeros stand for the empty prompt.

    Raises:
        ValueError: tensors are missing or left over, by name.
    """
    if kind is None:
        return Unconditional()
    if kind == "clip":
        return clip_text(parts[0].state, **parts[0].settings)
    if kind == "open_clip":
        return open_clip_text(parts[0].state, **parts[0].settings)
    if kind == "class" and set(parts[0].state) == {"embedding.weight"}:
        return _class_label(parts[0].state)
    if kind == "bert":
        return bert_text(parts[0].state, **parts[0].settings)
    if kind in ("sdxl", "refiner"):
        null = "zeros" if kind == "sdxl" and zero_null else "empty"
        return _text_and_sizes(parts, SDXL if kind == "sdxl" else SDXL_REFINER, vector_dim or 0, image_size, null)
    return CarriedConditioner(kind, {name: tensor for part in parts for name, tensor in part.state.items()})


def _text_and_sizes(
    parts: Sequence[TextPart], columns: Sequence[str], vector_dim: int, image_size: int, null: str
) -> Conditioner:
    """SDXL's conditioner: encoders of text, the last of which pools, then embedded numbers."""
    *first, last = parts
    shared: dict[str, Any] = {"final_norm": False, "null": null}
    encoders: list[Conditioner] = [clip_text(part.state, layer=-2, **{**shared, **part.settings}) for part in first]
    pooling: CLIPText | OpenCLIPText
    if last.kind == "open_clip":
        pooling = open_clip_text(last.state, pooled=True, **{**shared, **last.settings})
    else:
        pooling = clip_text(last.state, layer=-2, pooled=True, **{**shared, **last.settings})
    if (vector_dim - pooling.vector_dim) % len(columns):
        raise ValueError(
            f"got a network for vectors {vector_dim} wide beside a text encoder that gives {pooling.vector_dim}, "
            f"expected {len(columns)} embedded numbers to make up the rest; is the text encoder another model's?"
        )
    sizes = dict.fromkeys([name for name in columns if name.endswith(("height", "width"))], float(image_size))
    dim = (vector_dim - pooling.vector_dim) // len(columns)
    return Combined([*encoders, pooling, SizeCrop(columns, dim=dim, defaults=sizes)]).eval()


def clip_text(state: Mapping[str, Tensor], *, config: Mapping[str, Any] | None = None, **settings: Any) -> CLIPText:
    """A CLIPText with weights under names such as `transformer.text_model.final_layer_norm.weight`.

    Args:
        config: settings of transformers.CLIPTextConfig that `clip_config` does not read from the shapes.
        settings: further arguments of `CLIPText`.
    """
    bare = without_prefix({name.removeprefix("transformer."): tensor for name, tensor in state.items()})
    with torch.device("meta"):
        encoder = CLIPText({**clip_config(bare), **(config or {})}, **settings)
    named = {_with_level(name): tensor for name, tensor in state.items()}
    return fill(encoder, named, part="a CLIP text encoder", tolerated=_CLIP_EXTRAS)


def open_clip_text(state: Mapping[str, Tensor], **settings: Any) -> OpenCLIPText:
    """An OpenCLIPText with weights under names such as `model.ln_final.weight`; settings are further arguments."""
    tower = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    for name in ("token_embedding.weight", "positional_embedding"):
        if name not in tower:
            raise ValueError(f"got an OpenCLIP text encoder without model.{name}, expected the whole encoder")
    given = dict(state)
    if "text_projection" in tower and "logit_scale" not in tower:
        # The temperature of contrastive training, at its start: files without it lack nothing that is used.
        given["model.logit_scale"] = torch.tensor(math.log(1 / 0.07), dtype=tower["text_projection"].dtype)
    with torch.device("meta"):
        encoder = OpenCLIPText(**{**open_clip_geometry(tower), **settings})
    return fill(encoder, given, part="an OpenCLIP text encoder", tolerated=_OPEN_CLIP_EXTRAS)


def bert_text(state: Mapping[str, Tensor], *, vocabulary: Path | None = None) -> BERTText:
    """A BERTText with weights under names such as `transformer.token_emb.weight`; its heads are 8.

    Args:
        vocabulary: BERT's vocab.txt; None leaves it without a tokenizer, so that it reads no captions.
    """
    for name in ("transformer.token_emb.weight", "transformer.pos_emb.emb.weight"):
        if name not in state:
            raise ValueError(f"got a text transformer of LDM without {name}, expected the whole encoder")
    size, width = state["transformer.token_emb.weight"].shape
    length = len(state["transformer.pos_emb.emb.weight"])
    queries = state.get("transformer.attn_layers.layers.0.1.to_q.weight")
    geometry: dict[str, Any] = {
        "vocabulary_size": size,
        "length": length,
        "head_dim": 64 if queries is None else len(queries) // 8,
    }
    tokenizer = WordPieceTokenizer(vocabulary, length=length) if vocabulary else None
    with torch.device("meta"):
        encoder = BERTText(width, num_layers(state, "transformer.attn_layers.layers.") // 2, **geometry)
    encoder.tokenizer = tokenizer
    return fill(encoder, state, part="a text transformer of LDM")


def compvis_state(conditioner: Conditioner) -> dict[str, Tensor]:
    """A conditioner's tensors under the names of CompVis files, or of Stability's where there are several encoders.

    Raises:
        ValueError: a conditioner that those files cannot hold.
    """
    if isinstance(conditioner, Combined):
        encoders = [part for part in conditioner.conditioners if not isinstance(part, SizeCrop)]
        states = [_own_state(part) for part in encoders]
        return {f"conditioner.embedders.{i}.{name}": t for i, state in enumerate(states) for name, t in state.items()}
    return {f"cond_stage_model.{name}": tensor for name, tensor in _own_state(conditioner).items()}


def untold_settings(conditioner: Conditioner) -> list[dict[str, Any]]:
    """For each encoder the arguments that `build_conditioner` would take otherwise from its tensors alone."""
    parts = list(conditioner.conditioners) if isinstance(conditioner, Combined) else [conditioner]
    null = "zeros" if conditioner_kind(conditioner) == "sdxl" else "empty"
    return [_untold(part, null) for part in parts if not isinstance(part, SizeCrop)]


def _untold(encoder: nn.Module, null: str) -> dict[str, Any]:
    if not isinstance(encoder, CLIPText | OpenCLIPText):
        return {}
    told: dict[str, Any] = {} if encoder.null_kind == null else {"null": encoder.null_kind}
    if isinstance(encoder, OpenCLIPText):
        told |= {"quick_gelu": True} if encoder.quick_gelu else {}
        heads, width = arguments_of(encoder)["heads"], arguments_of(encoder)["width"]
        return told if heads == max(width // HEAD_WIDTH, 1) else {**told, "heads": heads}
    own = without_prefix({name.removeprefix("transformer."): tensor for name, tensor in encoder.state_dict().items()})
    usual, settings = {"layer_norm_eps": 1e-5, **clip_config(own)}, encoder.tower.config
    names = ("num_attention_heads", "hidden_act", "layer_norm_eps")
    if config := {name: found for name in names if (found := getattr(settings, name)) != usual[name]}:
        told["config"] = config
    return told if encoder.tokenizer.padding == "end" else {**told, "padding": encoder.tokenizer.padding}


def conditioner_kind(conditioner: Conditioner) -> str | None:
    """The kind of a conditioner, the inverse of `build_conditioner`.

    Raises:
        ValueError: a conditioner of none of the kinds.
    """
    if isinstance(conditioner, Unconditional):
        return None
    if isinstance(conditioner, CarriedConditioner):
        return conditioner.kind
    if isinstance(conditioner, CLIPText | OpenCLIPText | ClassLabel | BERTText):
        kinds = {CLIPText: "clip", OpenCLIPText: "open_clip", ClassLabel: "class", BERTText: "bert"}
        return kinds[type(conditioner)]
    if isinstance(conditioner, Combined):
        parts = [type(part) for part in conditioner.conditioners]
        if parts in ([CLIPText, OpenCLIPText, SizeCrop], [CLIPText, CLIPText, SizeCrop]):
            return "sdxl"
        if parts == [OpenCLIPText, SizeCrop]:
            return "refiner"
    raise ValueError(
        f"got a conditioner {type(conditioner).__name__}, expected one of a published family (CLIPText, OpenCLIPText, "
        "ClassLabel, Unconditional, or those of SDXL together); write format=ldm, which holds any"
    )


def _own_state(conditioner: nn.Module) -> dict[str, Tensor]:
    if isinstance(conditioner, CarriedConditioner):
        return conditioner.tensors
    if isinstance(conditioner, CLIPText | OpenCLIPText | BERTText | ClassLabel | Unconditional):
        return conditioner.state_dict()
    raise ValueError(f"got a conditioner {type(conditioner).__name__}, which CompVis files cannot hold")


def _class_label(state: Mapping[str, Tensor]) -> Conditioner:
    """Classes of which the last is "no class", as cin256-v2 was trained."""
    count, width = state["embedding.weight"].shape
    with torch.device("meta"):
        labels = ClassLabel(count - 1, width=width)
    return fill(labels, state, part="a class embedding")


def _part_kind(state: Mapping[str, Tensor]) -> str:
    if any(name.startswith(("transformer.text_model.", "transformer.encoder.layers.")) for name in state):
        return "clip"
    if any(name.startswith(("model.transformer.resblocks.", "model.logit_scale")) for name in state):
        return "open_clip"
    if any(name.startswith("transformer.attn_layers.") for name in state):
        return "bert"
    if "embedding.weight" in state:
        return "class"
    return "first stage" if "encoder.conv_in.weight" in state else "unknown"


def _with_level(name: str) -> str:
    """The name with `text_model.`, which some tools and newer versions of transformers leave out."""
    start, _, rest = name.partition("transformer.")
    bare = not start and rest.startswith(("embeddings.", "encoder.", "final_layer_norm."))
    return f"transformer.text_model.{rest}" if bare else name
