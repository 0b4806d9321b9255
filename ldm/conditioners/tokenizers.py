"""From captions to token ids."""

from __future__ import annotations

import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, normalizers, pre_tokenizers, processors
from torch import Tensor

from ldm.conditioners.pretrained import explained


class Tokenizer(ABC):
    """Captions to ids (B, L) int64 and a mask (B, L) bool that is True where a token is real.

    Attributes:
        vocabulary_size: ids lie in [0, vocabulary_size).
        length: L, where captions are cut or padded.
    """

    vocabulary_size: int
    length: int

    @abstractmethod
    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(ids, mask), each (B, length)."""


def read_tokens(tokenizer: Tokenizer, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(ids, mask), each (B, L), of a batch's captions: those that `ldm data encode text=ids` stored, else made here."""
    if "text_ids" in batch:
        return batch["text_ids"].long(), batch["text_mask"]
    return tokenizer(batch["caption"])


class WordTokenizer(Tokenizer):
    """One token a word, from a short vocabulary: for captions that keep to it.

    Words outside the vocabulary become one "unknown" token, with a warning that names them.
    """

    SPECIAL = ("[PAD]", "[UNK]", "[START]", "[END]")

    def __init__(self, words: Sequence[str], *, length: int = 16) -> None:
        if len({*words, *self.SPECIAL}) != len(words) + len(self.SPECIAL) or any(
            word != word.lower() for word in words
        ):
            raise ValueError("got a vocabulary with a word twice or with capitals, expected each once, in lower case")
        vocabulary = {word: i for i, word in enumerate([*self.SPECIAL, *words])}
        self.vocabulary_size, self.length = len(vocabulary), length
        self._tokenizer = FastTokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        self._tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        self._tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        start, end = ("[START]", vocabulary["[START]"]), ("[END]", vocabulary["[END]"])
        self._tokenizer.post_processor = processors.TemplateProcessing("[START] $A [END]", special_tokens=[start, end])
        self._tokenizer.enable_truncation(length)
        self._tokenizer.enable_padding(length=length)

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        encodings = self._tokenizer.encode_batch(list(captions))
        ids = torch.tensor([encoding.ids for encoding in encodings])
        mask = torch.tensor([encoding.attention_mask for encoding in encodings], dtype=torch.bool)
        if bool((ids == self.SPECIAL.index("[UNK]")).any()):
            unknown = {
                caption[slice(*offset)]
                for caption, encoding in zip(captions, encodings, strict=True)
                for offset, token in zip(encoding.offsets, encoding.tokens, strict=True)
                if token == "[UNK]"
            }
            warnings.warn(f"words that the model has never seen: {', '.join(sorted(unknown))}", stacklevel=2)
        return ids, mask


class CLIPTokenizer(Tokenizer):
    """CLIP's byte-pair encoding, from the vocabulary inside open_clip: any text, nothing to download.

    Text is cleaned as CLIP's training text was: broken encodings and typographic quotes repaired, HTML escapes undone,
    white space joined, lower case. Ids are those of transformers, whose tokenizer leaves out the first two, and which
    takes "!" for padding in the configuration of SD 2 and SDXL.

    Args:
        length: L, start and end tokens included.
        padding: with id 0, as open_clip does, or with the end token, as transformers does for CLIP ViT-L/14.
    """

    START, END = 49406, 49407

    def __init__(self, *, length: int = 77, padding: Literal["zero", "end"] = "zero") -> None:
        import open_clip  # takes 2 s, and only this tokenizer needs it

        if padding not in ("zero", "end"):
            raise ValueError(f"got tokenizer.padding={padding}, expected zero or end")
        if length < 3:
            raise ValueError(f"got tokenizer.length={length}, expected at least 3: start, end and a word")
        self._tokenizer = open_clip.SimpleTokenizer(context_length=length)
        self.vocabulary_size, self.length, self.padding = self._tokenizer.vocab_size, length, padding
        self.added: dict[str, list[int]] = {}

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids = torch.stack([self.frame(self.encode(caption)) for caption in captions])
        is_end = ids == self.END
        # Padding may be id 0, which is also a real token ("!"), or the end token: the first end decides.
        mask = torch.cumsum(is_end.int(), 1) - is_end.int() == 0
        return ids, mask

    def encode(self, text: str) -> list[int]:
        """The ids of a text of any length, without start, end and padding."""
        if not self.added:
            return self._tokenizer.encode(text)
        parts = self._names.split(self._tokenizer.clean_fn(text))
        return [i for part in parts for i in self.added.get(part) or self._tokenizer.encode(part)]

    def frame(self, ids: Sequence[int]) -> Tensor:
        """Ids (L,) between start and end, cut or padded to the length."""
        framed = [self.START, *ids[: self.length - 2], self.END]
        pad = self.END if self.padding == "end" else 0
        return torch.tensor(framed + [pad] * (self.length - len(framed)))

    def add(self, names: Mapping[str, Sequence[int]]) -> None:
        """Maps names in captions to ids of their own.

        Raises:
            ValueError: a name is empty or already there.
        """
        cleaned = {self._tokenizer.clean_fn(name): list(ids) for name, ids in names.items()}
        if "" in cleaned or len(cleaned) < len(names) or cleaned.keys() & self.added.keys():
            raise ValueError(
                f"got new tokens {', '.join(names)}, expected names that are not empty, each once whatever its case, "
                f"besides those that are there: {', '.join(self.added) or 'none'}"
            )
        self.added = self.added | cleaned
        self.vocabulary_size = max(self.vocabulary_size, *(i + 1 for ids in cleaned.values() for i in ids))

    @property
    def _names(self) -> re.Pattern[str]:
        """The added names; an end that is a letter must be the end of a word."""
        words = [
            ("" if re.match(r"\W", name) else r"\b") + re.escape(name) + ("" if re.search(r"\W$", name) else r"\b")
            for name in sorted(self.added, key=len, reverse=True)
        ]
        return re.compile(f"({'|'.join(words)})")


class PretrainedTokenizer(Tokenizer):
    """The tokenizer of a pretrained model of transformers.

    Args:
        path: a folder with tokenizer.json and tokenizer_config.json (or older files), or a hub id.
        length: L, where captions are cut or padded.

    Raises:
        ValueError: there is none at the path.
    """

    def __init__(self, path: Path | str, *, length: int) -> None:
        with explained(
            path, holds="a folder with tokenizer.json and tokenizer_config.json", source="google/t5-v1_1-xxl"
        ):
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(str(path))
        if self._tokenizer.pad_token_id is None:
            raise ValueError(f"got the tokenizer at {path}, which has no padding token, expected that of an encoder")
        self.vocabulary_size, self.length = len(self._tokenizer), length

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        encoded = self._tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        return encoded["input_ids"], encoded["attention_mask"].bool()


class WordPieceTokenizer(Tokenizer):
    """BERT's word pieces, lower case, between [CLS] and [SEP] (Devlin et al. 2019).

    Args:
        path: vocab.txt, a folder that holds it, or a hub id such as google-bert/bert-base-uncased.
        length: L, where captions are cut or padded.

    Raises:
        ValueError: there is no vocabulary at the path.
    """

    def __init__(self, path: Path | str, *, length: int = 77) -> None:
        with explained(path, holds="vocab.txt, or a folder with it", source="google-bert/bert-base-uncased"):
            words = _vocabulary_file(path).read_text("utf-8").rstrip("\n").split("\n")
            vocabulary = {word: i for i, word in enumerate(words)}
            cls, sep, pad, unknown = ((token, vocabulary[token]) for token in ("[CLS]", "[SEP]", "[PAD]", "[UNK]"))
        self._tokenizer = FastTokenizer(models.WordPiece(vocabulary, unk_token=unknown[0]))
        self._tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        self._tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self._tokenizer.post_processor = processors.BertProcessing(sep, cls)
        self._tokenizer.enable_truncation(length)
        self._tokenizer.enable_padding(length=length, pad_id=pad[1], pad_token=pad[0])
        self.vocabulary_size, self.length = len(vocabulary), length

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        encodings = self._tokenizer.encode_batch(list(captions))
        ids = torch.tensor([encoding.ids for encoding in encodings])
        return ids, torch.tensor([encoding.attention_mask for encoding in encodings], dtype=torch.bool)


def _vocabulary_file(path: Path | str) -> Path:
    place = Path(path).expanduser()
    if place.is_file():
        return place
    if place.is_dir():
        return place / "vocab.txt"
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(str(path), "vocab.txt"))
