"""Conditioners: from a batch's captions and labels to what the network is told."""

from ldm.conditioners.base import Conditioner
from ldm.conditioners.bert import BERTText
from ldm.conditioners.class_label import ClassIds, ClassLabel
from ldm.conditioners.clip import CLIPText
from ldm.conditioners.combined import Combined
from ldm.conditioners.depth_map import DepthMap
from ldm.conditioners.layout import Layout
from ldm.conditioners.low_resolution import LowResolution
from ldm.conditioners.masked_image import MaskedImage
from ldm.conditioners.noisy_embedding import NoisyEmbedding
from ldm.conditioners.open_clip import OpenCLIPText
from ldm.conditioners.precomputed import PrecomputedText
from ldm.conditioners.semantic_map import SemanticMap
from ldm.conditioners.size_crop import SizeCrop
from ldm.conditioners.stacked import Stacked
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
    "DepthMap",
    "Layout",
    "LowResolution",
    "MaskedImage",
    "NoisyEmbedding",
    "OpenCLIPText",
    "PrecomputedText",
    "PretrainedTokenizer",
    "SemanticMap",
    "SizeCrop",
    "Stacked",
    "T5Text",
    "TextEncoder",
    "TextTransformer",
    "Tokenizer",
    "Unconditional",
    "WordPieceTokenizer",
    "WordTokenizer",
]
