"""From captions to token ids."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, normalizers, pre_tokenizers, processors
from torch import Tensor


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
    """CLIP's byte-pair encoding, from the vocabulary inside open_clip: any text, nothing to download."""

    def __init__(self, *, length: int = 77) -> None:
        import open_clip  # takes 2 s, and only this tokenizer needs it

        self._tokenizer = open_clip.SimpleTokenizer(context_length=length)
        self.vocabulary_size, self.length = self._tokenizer.vocab_size, length

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids = self._tokenizer(list(captions))
        is_end = ids == self._tokenizer.eot_token_id
        # Padding is id 0 after the end token; id 0 is also a real token ("!"), so the end decides, not the id.
        mask = torch.cumsum(is_end.int(), 1) - is_end.int() == 0
        return ids, mask
