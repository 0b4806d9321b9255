"""Text embeddings that `ldm data encode` wrote, in the place of the encoder that made them."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ldm.conditioners.base import Conditioner
from ldm.conditioners.combined import Combined
from ldm.conditioners.tokenizers import Tokenizer
from ldm.diffusion import Conditioning
from ldm.nn.fingerprint import weights_sha256

PARTS = ("context", "vector", "mask")
# Of a batch, what a dataset reads out of shards with text embeddings.
BATCH_KEYS = {part: f"text_{part}" for part in PARTS}
# What a tokenizer makes of these tells its padding, its length and its cleaning.
PROBES = ("", "a photo of a cat", "Two  DOGS, 3 o'clock &amp; caf\u00e9!")
Encoder = Callable[[], Conditioner]


class PrecomputedText(Conditioner):
    """Text embeddings out of the batch: Conditioning(context, mask, vector), those that the encoder gave.

    Training reads `text_context` (B, L, D), `text_vector` (B, D) and `text_mask` (B, L) and needs no encoder. The null
    condition is the encoder's own, kept beside the shards. Prompts need the encoder itself, which is built when the
    first prompt is read and must be the one that made the embeddings.

    Args:
        path: the text.safetensors that `ldm data encode` wrote.
        encoder: what builds the encoder, or several whose outputs are joined as by `Combined`; None trains alone, and
            reads no prompt.

    Attributes:
        text_sha256: the encoder's hash, by `text_sha256`.
    """

    def __init__(self, path: Path | str, *, encoder: Encoder | Sequence[Encoder] | None = None) -> None:
        super().__init__()
        self.text_sha256, null = read_null(path)
        self.part_names = tuple(null.parts())
        for name, part in null.parts().items():
            self.register_buffer(f"null_{name}", part, persistent=False)
        self._builders = encoder
        # In a list, so that the encoder is no part of this module: it is neither trained, averaged nor saved.
        self._built: list[Conditioner] = []

    def forward(self, batch: dict[str, Any]) -> Conditioning:
        """The batch's embeddings, in the null condition's dtype.

        Raises:
            ValueError: the batch has none.
        """
        null = self.null(1).parts()
        if missing := [BATCH_KEYS[name] for name in null if BATCH_KEYS[name] not in batch]:
            raise ValueError(
                f"got a batch without {', '.join(missing)}, expected shards with text embeddings; write them with "
                "ldm data encode conditioner=..."
            )
        return Conditioning(**{name: batch[BATCH_KEYS[name]].to(part) for name, part in null.items()})

    def null(self, n: int) -> Conditioning:
        """The encoder's null condition, n times."""
        return Conditioning(**{name: getattr(self, f"null_{name}") for name in self.part_names}).expand(n)

    def prompt_pair(
        self, prompts: Sequence[str], negatives: Sequence[str], *, image_size: tuple[int, int]
    ) -> tuple[Conditioning, Conditioning]:
        """What the encoder makes of prompts, in the null condition's dtype.

        Raises:
            ValueError: there is no encoder, or it is another than the one that made the embeddings.
        """
        with torch.no_grad():
            cond, uncond = self.encoder.prompt_pair(prompts, negatives, image_size=image_size)
        return self._fitted(cond), self._fitted(uncond)

    def num_chunks(self, text: str) -> int:
        """The encoder's."""
        return self.encoder.num_chunks(text)

    @property
    def encoder(self) -> Conditioner:
        """The encoder, built on first use, on this module's device.

        Raises:
            ValueError: as `prompt_pair`.
        """
        if not self._built:
            self._built.append(self._build())
        return self._built[0].to(self._place.device)

    def _build(self) -> Conditioner:
        if self._builders is None:
            raise ValueError(
                "conditioner.encoder: got none, so that no prompt can be read; set conditioner.encoder to the text "
                "encoder that ldm data encode was given"
            )
        builders = [self._builders] if callable(self._builders) else list(self._builders)
        parts = [build() for build in builders]
        encoder = (parts[0] if callable(self._builders) else Combined(parts)).eval().requires_grad_(False)
        found = text_sha256(encoder)
        if found != self.text_sha256:
            raise ValueError(
                f"conditioner.encoder: got the text encoder {found[:12]}, expected {self.text_sha256[:12]}, whose "
                "embeddings the model was trained on; set conditioner.encoder to that one"
            )
        return encoder

    @property
    def _place(self) -> Tensor:
        return getattr(self, f"null_{self.part_names[0]}")

    def _fitted(self, cond: Conditioning) -> Conditioning:
        null = self.null(1).parts()
        return Conditioning(**{name: part.to(null[name]) for name, part in cond.parts().items()})


def text_sha256(encoder: Conditioner) -> str:
    """A hash of all that decides what a text encoder makes of a caption: weights, settings and tokenizer."""
    digest = hashlib.sha256(weights_sha256(encoder).encode())
    for name, module in encoder.named_modules():
        if isinstance(module, Conditioner):
            digest.update(json.dumps([name, type(module).__name__, _settings(module)], sort_keys=True).encode())
            if isinstance(tokenizer := getattr(module, "tokenizer", None), Tokenizer):
                digest.update(_probed(tokenizer))
    return digest.hexdigest()


def embedded(encoder: Conditioner, captions: Sequence[str]) -> dict[str, Tensor]:
    """The parts of the captions' conditions, by name, on the CPU.

    Raises:
        ValueError: the encoder needs more than captions, or makes what is no embedding of a text.
    """
    check_text_encoder(encoder)
    with torch.no_grad():
        parts = encoder({"caption": list(captions)}).parts()
    if not parts or not parts.keys() <= set(PARTS):
        raise ValueError(
            f"conditioner: got one that says {sorted(parts) or 'nothing'} of a caption, expected some of "
            f"{', '.join(PARTS)}; choose a text encoder, such as conditioner=clip_l"
        )
    return {name: part.detach().cpu() for name, part in parts.items()}


def token_ids(encoder: Conditioner, captions: Sequence[str]) -> dict[str, Tensor]:
    """ids (B, L) int32 and mask (B, L) bool, of the captions: what the encoder reads of them.

    Raises:
        ValueError: as `one_tokenizer`.
    """
    ids, mask = one_tokenizer(encoder)(captions)
    return {"ids": ids.to(torch.int32), "mask": mask}


def tokens_sha256(encoder: Conditioner) -> str:
    """A hash of what an encoder's tokenizer makes of a caption, which no encoder's own hash equals."""
    return f"tokens-{hashlib.sha256(_probed(one_tokenizer(encoder))).hexdigest()}"


def one_tokenizer(encoder: nn.Module) -> Tokenizer:
    """The tokenizer of an encoder, or the one that its parts agree on.

    Raises:
        ValueError: it has none, or several that read a caption differently.
    """
    owned = [getattr(module, "tokenizer", None) for module in encoder.modules()]
    found = {_probed(tokenizer): tokenizer for tokenizer in owned if isinstance(tokenizer, Tokenizer)}
    if len(found) != 1:
        raise ValueError(
            f"conditioner: got one with {len(found)} tokenizers, expected one, whose ids are stored; store embeddings "
            "instead: text=embeddings"
        )
    return next(iter(found.values()))


def check_text_encoder(encoder: Conditioner) -> None:
    """Raises ValueError for a conditioner that reads more than captions."""
    if encoder.columns or isinstance(encoder, PrecomputedText):
        raise ValueError(
            f"conditioner: got one that reads {', '.join(encoder.columns) or 'embeddings'}, expected a text encoder, "
            "which reads captions alone; give the rest to the training, beside ldm.conditioners.PrecomputedText"
        )


def null_bytes(encoder: Conditioner, *, dtype: torch.dtype) -> bytes:
    """The file with an encoder's null condition and hash: what `PrecomputedText` reads."""
    check_text_encoder(encoder)
    with torch.no_grad():
        parts = encoder.null(1).parts()
    cast = {
        name: (part if part.dtype == torch.bool else part.to(dtype)).detach().cpu().contiguous()
        for name, part in parts.items()
    }
    return save(cast, metadata={"text_sha256": text_sha256(encoder)})


def read_null(path: Path | str) -> tuple[str, Conditioning]:
    """The encoder's hash and its null condition, floats in float32, out of such a file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"conditioner.path: got {path}, where there is no file, expected the text.safetensors that `ldm data "
            "encode conditioner=...` writes; run it first"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            parts: Mapping[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"conditioner.path: got {path}, which is damaged ({error}); write it again") from error
    if "text_sha256" not in metadata or not parts or not parts.keys() <= set(PARTS):
        raise ValueError(f"conditioner.path: got {path}, expected the text.safetensors of ldm data encode")
    floats = {name: part if part.dtype == torch.bool else part.float() for name, part in parts.items()}
    return metadata["text_sha256"], Conditioning(**floats)


def precomputed_parts(conditioner: nn.Module) -> list[PrecomputedText]:
    """The conditioner, or those inside it, that read embeddings."""
    return [module for module in conditioner.modules() if isinstance(module, PrecomputedText)]


def _settings(module: Conditioner) -> dict[str, Any]:
    """The plain attributes of a module: which layer it reads, its null condition and the like."""
    plain = (bool, int, float, str, type(None))
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, plain) and not name.startswith("_") and name not in ("training", "max_chunks")
    }


def _probed(tokenizer: Tokenizer) -> bytes:
    """What a tokenizer makes of the probes, and its vocabulary."""
    inner: Any = getattr(tokenizer, "_tokenizer", None)
    vocabulary = inner.get_vocab() if hasattr(inner, "get_vocab") else getattr(inner, "encoder", {})
    words = json.dumps([sorted(vocabulary.items()), getattr(tokenizer, "added", {})]).encode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # words of a probe that a small vocabulary lacks
        ids, mask = tokenizer(list(PROBES))
    return ids.numpy().tobytes() + mask.numpy().tobytes() + str(tuple(ids.shape)).encode() + words
