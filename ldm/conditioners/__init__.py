"""Conditioners: from a batch's captions and labels to what the network is told."""

from ldm.conditioners.base import Conditioner
from ldm.conditioners.class_label import ClassLabel
from ldm.conditioners.tokenizers import CLIPTokenizer, Tokenizer, WordTokenizer
from ldm.conditioners.transformer import TextTransformer

__all__ = ["CLIPTokenizer", "ClassLabel", "Conditioner", "TextTransformer", "Tokenizer", "WordTokenizer"]
