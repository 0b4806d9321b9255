"""What fine-tuning trains instead of the whole network: a LoRA, or the embeddings of a new word."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.conditioners import CLIPText, Conditioner, OpenCLIPText, TextEncoder
from ldm.diffusion import Denoiser
from ldm.interop import lora, textual_inversion
from ldm.interop.lora_files import LowRank
from ldm.interop.lora_layers import MODELS, Layer, Parts, text_encoders

Layers = Literal["attention", "transformer", "all"]
NAME = "trained"


class Adapter(Protocol):
    """A small part that is trained while the model itself stays as it is."""

    def attach(self, denoiser: Denoiser, conditioner: Conditioner) -> None:
        """Puts itself into the model; afterwards its parameters alone have gradients."""

    def write(self, denoiser: Denoiser, conditioner: Conditioner, folder: Path) -> dict[str, str]:
        """Writes the trained part for other tools; returns what it is, and its file's name."""


@dataclass(frozen=True)
class LoRA:
    """Low-rank updates of layers (Hu et al. 2022).

    Args:
        rank: of each update.
        alpha: the update is scaled by alpha / rank; None is the rank.
        layers: of the U-Net: "attention" the projections of attention; "transformer" all layers of the transformers,
            as sd-scripts does; "all" convolutions and embeddings of time and vector too.
        text_encoder: whether to change the text encoders as well, their attention and MLPs.
        format: of the file that is written.
    """

    rank: int = 16
    alpha: float | None = None
    layers: Layers = "transformer"
    text_encoder: bool = False
    format: lora.Format = "kohya"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"got adapter.rank={self.rank}, expected at least 1")
        if self.layers not in get_args(Layers):
            raise ValueError(f"got adapter.layers={self.layers}, expected one of {', '.join(get_args(Layers))}")
        if self.format not in get_args(lora.Format):
            raise ValueError(f"got adapter.format={self.format}, expected one of {', '.join(get_args(lora.Format))}")

    def attach(self, denoiser: Denoiser, conditioner: Conditioner) -> None:
        """Adds updates that change nothing yet.

        Raises:
            ValueError: there is no such layer.
        """
        parts = Parts(denoiser, conditioner)
        used = {
            model: used_blocks(encoder) for model, (_, encoder) in zip(MODELS, text_encoders(conditioner), strict=False)
        }
        chosen = [layer for layer in parts.layers() if self._is_chosen(layer, used)]
        if not any(layer.diffusers.startswith("unet.") for layer in chosen):
            raise ValueError(
                f"got adapter.layers={self.layers} for a network without such layers, expected a U-Net with "
                "transformers; set adapter.layers=all"
            )
        if self.text_encoder and not text_encoders(conditioner):
            raise ValueError("got adapter.text_encoder=true for a model without a CLIP text encoder, expected false")
        lora.add_adapter(parts, {layer: self._start(lora.weight_shape(parts, layer)) for layer in chosen}, NAME)

    def write(self, denoiser: Denoiser, conditioner: Conditioner, folder: Path) -> dict[str, str]:
        """Writes folder/lora.safetensors."""
        lora.write_lora(denoiser, conditioner, folder / "lora.safetensors", adapter=NAME, format=self.format)
        return {"lora": "lora.safetensors"}

    def _is_chosen(self, layer: Layer, used: Mapping[str, int]) -> bool:
        model, _, name = layer.diffusers.partition(".")
        if model != "unet":
            block = re.search(r"\.layers\.(\d+)\.", name)
            return self.text_encoder and block is not None and int(block[1]) < used[model]
        if self.layers == "attention":
            return ".attn1." in name or ".attn2." in name
        return self.layers == "all" or ".attentions." in name

    def _start(self, shape: tuple[int, ...]) -> LowRank:
        out, *inside = shape
        down = nn.init.kaiming_uniform_(torch.empty(self.rank, *inside), a=5**0.5)
        up = torch.zeros(out, self.rank, *[1] * (len(inside) - 1))
        return LowRank(down, up, float(self.rank if self.alpha is None else self.alpha))


@dataclass(frozen=True)
class TextualInversion:
    """A new word whose embeddings are learned, and nothing else (Gal et al. 2022).

    Args:
        token: the word, as in captions and prompts.
        initializer: known words whose mean embedding the new one starts from.
        num_vectors: how many tokens the word stands for.
        format: of the file that is written.
    """

    token: str
    initializer: str
    num_vectors: int = 1
    format: textual_inversion.Format = "diffusers"

    def __post_init__(self) -> None:
        if self.num_vectors < 1:
            raise ValueError(f"got adapter.num_vectors={self.num_vectors}, expected at least 1")
        if self.format not in get_args(textual_inversion.Format):
            known = ", ".join(get_args(textual_inversion.Format))
            raise ValueError(f"got adapter.format={self.format}, expected one of {known}")

    def attach(self, denoiser: Denoiser, conditioner: Conditioner) -> None:
        """Teaches every text encoder the word.

        Raises:
            ValueError: there is no text encoder, the word is known, or the initializer is empty.
        """
        encoders = text_encoders(conditioner)
        if not encoders:
            raise ValueError("got a model without a CLIP text encoder, expected one to teach a word")
        denoiser.requires_grad_(False)
        conditioner.requires_grad_(False)
        for _, encoder in encoders:
            self._teach(encoder)

    def write(self, denoiser: Denoiser, conditioner: Conditioner, folder: Path) -> dict[str, str]:
        """Writes folder/learned_embeds.safetensors; in a1111's format, folder/<word>.safetensors."""
        tables = [encoder.token_embedding for _, encoder in text_encoders(conditioner)]
        vectors = [table.rows for table in tables if isinstance(table, LearnedTokens)]
        stem = (
            "learned_embeds"
            if self.format == "diffusers"
            else "".join(c for c in self.token if c.isalnum() or c in "-_")
        )
        path = folder / f"{stem}.safetensors"
        textual_inversion.write_embedding(path, token=self.token, vectors=vectors, format=self.format)
        return {"embedding": path.name}

    def check_captions(self, captions: Iterable[str], conditioner: Conditioner) -> None:
        """Raises ValueError where no caption holds the word: its embeddings would stay as they are."""
        _, encoder = text_encoders(conditioner)[0]
        first = encoder.token_embedding.num_embeddings - self.num_vectors
        if not any(max(encoder.tokenizer.encode(caption), default=0) >= first for caption in captions):
            raise ValueError(
                f"got model.adapter.token={self.token}, which no caption of data.train holds, expected the word in "
                f'them; write the shards with dataset=folder dataset.caption="a photo of {self.token}"'
            )

    def _teach(self, encoder: TextEncoder) -> None:
        if len(encoder.tokenizer.encode(self.token)) == 1:
            raise ValueError(
                f"got model.adapter.token={self.token}, a word that the text encoder knows already, expected a new "
                f"one; set model.adapter.token=my-{self.token}"
            )
        known = encoder.tokenizer.encode(self.initializer)
        if not known:
            raise ValueError(f"got adapter.initializer={self.initializer!r}, expected a word that says what it is")
        table = encoder.token_embedding
        start = table.weight[known].mean(0).expand(1, self.num_vectors, -1)
        encoder.add_tokens([self.token], start)
        learned = LearnedTokens(encoder.token_embedding, self.num_vectors)
        encoder.replace_token_embedding(cast(nn.Embedding, learned))


def used_blocks(encoder: TextEncoder) -> int:
    """How many of an encoder's blocks its output depends on: those behind would never get a gradient."""
    if isinstance(encoder, OpenCLIPText):
        num_blocks = len(encoder.model.transformer.resblocks)
        return num_blocks if encoder.pooled or encoder.layer == "last" else num_blocks - 1
    assert isinstance(encoder, CLIPText)
    num_blocks = encoder.transformer.config.num_hidden_layers
    # Hidden states count from the embeddings on, or from the end.
    return num_blocks if encoder.pooled or encoder.layer is None else encoder.layer % (num_blocks + 1)


class LearnedTokens(nn.Module):
    """A table of token embeddings of which only the last rows are trained.

    They are a parameter of their own, so that no optimizer can touch the others.

    Args:
        table: the whole table.
        num_rows: how many of its last rows are trained.
    """

    def __init__(self, table: nn.Embedding, num_rows: int) -> None:
        super().__init__()
        known, rows = table.weight.detach().split([len(table.weight) - num_rows, num_rows])
        self.known = nn.Parameter(known, requires_grad=False)
        self.rows = nn.Parameter(rows.clone())

    @property
    def num_embeddings(self) -> int:
        """The number of rows."""
        return len(self.known) + len(self.rows)

    @property
    def weight(self) -> Tensor:
        """The whole table (N, D)."""
        return torch.cat([self.known, self.rows])

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings (..., D) of ids (...)."""
        first = len(self.known)
        known = F.embedding(ids.clamp(max=first - 1), self.known)
        learned = F.embedding((ids - first).clamp(min=0), self.rows)
        return torch.where((ids < first)[..., None], known, learned)
