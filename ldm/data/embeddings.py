"""Text embeddings or token ids, as `ldm data encode` stores them beside a sample's latents."""

from collections.abc import Mapping

import numpy as np

FLIPPED, TEXT = "flip.npy", "safetensors"
# Of a .safetensors member, its kind of numbers and its axes; the batch has them as text_context, text_vector, ...
PARTS = {"context": ("f", 2), "vector": ("f", 1), "mask": ("b", 1), "ids": ("i", 1)}
# What each sample's json says made its embeddings.
HASH = "text_sha256"


def decode_embeddings(content: bytes) -> dict[str, np.ndarray]:
    """Decode text embeddings: context (L, D) and vector (D,), floats, mask (L,), bool, ids (L,), whole; some of them.

    Raises ValueError for anything else.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays = load(content)
    except SafetensorError as error:
        raise ValueError(f"got no safetensors ({error})") from error
    if not arrays or not arrays.keys() <= PARTS.keys():
        raise ValueError(f"got {sorted(arrays)}, expected some of {', '.join(PARTS)}")
    for name, array in arrays.items():
        kind, dimensions = PARTS[name]
        if array.dtype.kind != kind or array.ndim != dimensions:
            raise ValueError(f"got {name} {array.dtype} {array.shape}, expected {dimensions} axes of kind {kind}")
    return arrays


def batch_arrays(embeddings: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return text embeddings under their names in the batch."""
    return {f"text_{name}": array for name, array in embeddings.items()}
