"""T5 text encoders (Raffel et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Self, get_args

import torch

from ldm.conditioners.base import Conditioner
from ldm.conditioners.pretrained import from_transformers
from ldm.conditioners.text_encoder import Null
from ldm.conditioners.tokenizers import PretrainedTokenizer, Tokenizer, read_tokens
from ldm.diffusion import Conditioning
from ldm.nn.arguments import keeps_arguments

V1_1_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "feed_forward_proj": "gated-gelu",
    "layer_norm_epsilon": 1e-6,
}
"""The encoder of T5 v1.1 XXL, as settings of transformers.T5Config."""


class T5Text(Conditioner):
    """A frozen T5 encoder with random weights, to load into; `T5Text.load` reads a trained one.

    Captions to Conditioning(context (B, L, context_dim), mask (B, L), True where a token is real). Prompts are read as
    they are, without weights in brackets, and cut at L tokens. Under an autocast to float16, which activations of T5
    exceed, it computes in float32.

    Args:
        config: settings of transformers.T5Config; None is T5 v1.1 XXL.
        tokenizer: its length is L.
        null: the null condition: the encoding of "", or zeros with the mask of "".

    Attributes:
        transformer: transformers.T5EncoderModel.
    """

    is_frozen = True

    @keeps_arguments
    def __init__(self, config: Mapping[str, Any] | None = None, *, tokenizer: Tokenizer, null: Null = "empty") -> None:
        from transformers import T5Config, T5EncoderModel

        super().__init__()
        if null not in get_args(Null):
            raise ValueError(f"got conditioner.null={null}, expected one of {', '.join(get_args(Null))}")
        settings = T5Config(**{**V1_1_XXL, **(config or {})})
        if tokenizer.vocabulary_size > settings.vocab_size:
            raise ValueError(
                f"got a tokenizer with {tokenizer.vocabulary_size} ids, expected at most {settings.vocab_size}, the "
                "encoder's vocab_size; load the tokenizer that belongs to it"
            )
        self.tokenizer, self.null_kind, self.context_dim = tokenizer, null, settings.d_model
        self.transformer = T5EncoderModel(settings)
        self.eval().requires_grad_(False)

    @classmethod
    def load(
        cls, path: Path | str, *, tokenizer_path: Path | str | None = None, length: int = 77, null: Null = "empty"
    ) -> Self:
        """A trained encoder from a local folder or the hub.

        Args:
            tokenizer_path: None where the tokenizer lies beside the weights.
            length: L.

        Raises:
            ValueError: there is none at the path.
        """
        from transformers import T5EncoderModel

        trained = from_transformers(T5EncoderModel, path, source="google/t5-v1_1-xxl")
        tokenizer = PretrainedTokenizer(path if tokenizer_path is None else tokenizer_path, length=length)
        with torch.device("meta"):
            encoder = cls({name: getattr(trained.config, name) for name in V1_1_XXL}, tokenizer=tokenizer, null=null)
        # Replaced, not loaded: two names share the embedding, which assigning would set apart.
        encoder.transformer = trained
        return encoder.eval().requires_grad_(False)

    def forward(self, batch: dict[str, Any]) -> Conditioning:
        """Encodes batch["caption"], B strings."""
        device = self.transformer.shared.weight.device
        ids, mask = (tensor.to(device) for tensor in read_tokens(self.tokenizer, batch))
        with _without_float16(device):
            context = self.transformer(input_ids=ids, attention_mask=mask).last_hidden_state
        return Conditioning(context=context, mask=mask)

    def null(self, n: int) -> Conditioning:
        """The encoding of "", or zeros with its mask, n times."""
        if self.null_kind == "empty":
            return self({"caption": [""]}).expand(n)
        weight = self.transformer.shared.weight
        context = weight.new_zeros(n, self.tokenizer.length, self.context_dim)
        return Conditioning(context=context, mask=self.tokenizer([""])[1].to(weight.device).expand(n, -1))

    def train(self, mode: bool = True) -> Self:
        """Frozen encoders stay in evaluation mode: T5 has dropout."""
        return super().train(mode and not self.is_frozen)


def _without_float16(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast where there is one to float16; any other stays."""
    # The meta device, on which memory and work are counted, knows no autocast.
    is_cast = device.type != "meta" and torch.is_autocast_enabled(device.type)
    if is_cast and torch.get_autocast_dtype(device.type) == torch.float16:
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
