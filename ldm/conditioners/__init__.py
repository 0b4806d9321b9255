"""Conditioners: from a batch's captions and labels to what the network is told."""

from ldm.conditioners.base import Conditioner
from ldm.conditioners.bert import BERTText
from ldm.conditioners.class_label import ClassIds, ClassLabel
from ldm.conditioners.clip import CLIPText
from ldm.conditioners.combined import Combined
from ldm.conditioners.open_clip import OpenCLIPText
from ldm.conditioners.size_crop import SizeCrop
from ldm.conditioners.t5 import T5Text
from ldm.conditioners.text_encoder import TextEncoder
from ldm.conditioners.tokenizers import (
    CLIPTokenizer,
    PretrainedTokenizer,
    Tokenizer,
    WordPieceTokenizer,
    WordTokenizer,
)
from ldm.conditioners.transformer import TextTransformer
from ldm.conditioners.unconditional import Unconditional

__all__ = [
    "BERTText",
    "CLIPText",
    "CLIPTokenizer",
    "ClassIds",
    "ClassLabel",
    "Combined",
    "Conditioner",
    "OpenCLIPText",
    "PretrainedTokenizer",
    "SizeCrop",
    "T5Text",
    "TextEncoder",
    "TextTransformer",
    "Tokenizer",
    "Unconditional",
    "WordPieceTokenizer",
    "WordTokenizer",
]
