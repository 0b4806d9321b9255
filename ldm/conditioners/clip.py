"""CLIP text encoders in the format of transformers (Radford et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from ldm.conditioners.pretrained import from_transformers
from ldm.conditioners.text_encoder import Null, TextEncoder
from ldm.conditioners.tokenizers import CLIPTokenizer
from ldm.diffusion import Conditioning
from ldm.nn.arguments import keeps_arguments

VIT_L_14 = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}
"""The text tower of CLIP ViT-L/14, as settings of transformers.CLIPTextConfig."""


class CLIPText(TextEncoder):
    """A CLIP text encoder with random weights, to load into; `CLIPText.load` reads a trained one.

    The defaults are Stable Diffusion 1's. SDXL's first encoder is `layer=11, final_norm=False, null="zeros"`.

    `state_dict` names weights as CompVis files do below `cond_stage_model.`, whatever the version of transformers:
    `transformer.text_model.embeddings.token_embedding.weight`. Loading takes names without `text_model.` too, and
    passes over `position_ids`, which older files hold.

    Args:
        config: settings of transformers.CLIPTextConfig; None is ViT-L/14.
        layer: which of the hidden states is the context, 0 being the embeddings and num_hidden_layers the last
            layer's; may count from the end; None is the last.
        final_norm: apply the final layer norm to it.
        pooled: add vector (B, projection_dim), the projected last state of the end token.
        padding: see `CLIPTokenizer`.
        null, max_chunks: see `TextEncoder`.

    Attributes:
        transformer: transformers.CLIPTextModel, or CLIPTextModelWithProjection where pooled.
    """

    @keeps_arguments
    def __init__(
        self,
        config: Mapping[str, Any] | None = None,
        *,
        layer: int | None = None,
        final_norm: bool = True,
        pooled: bool = False,
        padding: Literal["end", "zero"] = "end",
        null: Null = "empty",
        max_chunks: int = 8,
    ) -> None:
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        # Older configs give end token 2, which makes transformers pool at the highest id: wrong once tokens are added.
        ends = {"bos_token_id": CLIPTokenizer.START, "eos_token_id": CLIPTokenizer.END, "pad_token_id": None}
        settings = CLIPTextConfig(**{**VIT_L_14, **(config or {}), **ends})
        super().__init__(
            CLIPTokenizer(length=settings.max_position_embeddings, padding=padding),
            context_dim=settings.hidden_size,
            vector_dim=(settings.projection_dim or 0) if pooled else 0,
            null=null,
            max_chunks=max_chunks,
        )
        last = settings.num_hidden_layers
        if layer is not None and not -last - 1 <= layer <= last:
            raise ValueError(f"got conditioner.layer={layer}, expected 0 to {last}, or -{last + 1} to -1 from the end")
        self.layer, self.final_norm, self.pooled = layer, final_norm, pooled
        self.transformer = (CLIPTextModelWithProjection if pooled else CLIPTextModel)(settings)
        self.register_state_dict_post_hook(_to_compvis_names)
        self.register_load_state_dict_pre_hook(_to_own_names)
        self.register_load_state_dict_post_hook(_renew_positions)
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, path: Path | str, **settings: Any) -> Self:
        """A trained encoder from a local folder or the hub; settings are those of the constructor but `config`.

        Raises:
            ValueError: there is none at the path.
        """
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        architecture = CLIPTextModelWithProjection if settings.get("pooled") else CLIPTextModel
        trained = from_transformers(architecture, path, source="openai/clip-vit-large-patch14")
        config = {name: getattr(trained.config, name) for name in [*VIT_L_14, "layer_norm_eps"]}
        with torch.device("meta"):
            encoder = cls(config, **settings)
        encoder.load_state_dict({f"transformer.{k}": v for k, v in trained.state_dict().items()}, assign=True)
        return encoder.requires_grad_(False)

    @property
    def tower(self) -> nn.Module:
        """The part with `embeddings`, `encoder` and `final_layer_norm`: its place varies with transformers' version."""
        return getattr(self.transformer, "text_model", self.transformer)

    @property
    def token_embedding(self) -> nn.Embedding:
        return self.tower.embeddings.token_embedding  # type: ignore[return-value, union-attr]

    def replace_token_embedding(self, table: nn.Embedding) -> None:
        """Puts another table in the place of `token_embedding`."""
        self.tower.embeddings.token_embedding = table  # type: ignore[union-attr]
        for part in (self.tower, self.transformer):
            part.config.vocab_size = table.num_embeddings  # type: ignore[union-attr]

    def encode_ids(self, ids: Tensor) -> Conditioning:
        """Token ids (B, L), each row with start and end, to Conditioning(context (B, L, context_dim), vector)."""
        output = self.transformer(input_ids=ids, output_hidden_states=True)
        context = output.hidden_states[-1 if self.layer is None else self.layer]
        if self.final_norm:
            context = self.tower.final_layer_norm(context)  # type: ignore[operator]
        return Conditioning(context=context, vector=output.text_embeds if self.pooled else None)


def _to_compvis_names(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Puts `text_model.` into the names where this version of transformers has no such level."""
    start = f"{prefix}transformer."
    for name in [name for name in state if name.startswith(start)]:
        rest = name.removeprefix(start)
        state[start + (rest if rest.startswith(("text_model.", "text_projection.")) else f"text_model.{rest}")] = (
            state.pop(name)
        )


def _to_own_names(module: CLIPText, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The names of this version of transformers, from names with or without `text_model.`."""
    start = f"{prefix}transformer."
    level = "text_model." if hasattr(module.transformer, "text_model") else ""
    for name in [name for name in state if name.startswith(start)]:
        rest = name.removeprefix(start)
        tensor = state.pop(name)
        if rest.startswith("text_projection."):
            state[name] = tensor
        elif not rest.endswith("embeddings.position_ids"):
            state[start + level + rest.removeprefix("text_model.")] = tensor


def _renew_positions(module: CLIPText, _: Any) -> None:
    """Fills in what no file holds, where the encoder was built on the meta device and loaded with assign=True."""
    embeddings: Any = module.tower.embeddings
    if embeddings.position_ids.is_meta:
        count, device = embeddings.position_embedding.num_embeddings, embeddings.position_embedding.weight.device
        if device.type != "meta":
            embeddings.position_ids = torch.arange(count, device=device)[None]
