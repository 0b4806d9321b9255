"""Models of other projects: their files become our modules, and ours become their files."""

from ldm.interop.compvis import write_compvis
from ldm.interop.diffusers_writing import write_diffusers
from ldm.interop.families import FAMILIES, Family
from ldm.interop.model import Origin, PretrainedModel
from ldm.interop.native import write_ldm
from ldm.interop.open import is_foreign, open_model

__all__ = [
    "FAMILIES",
    "Family",
    "Origin",
    "PretrainedModel",
    "is_foreign",
    "open_model",
    "write_compvis",
    "write_diffusers",
    "write_ldm",
]
