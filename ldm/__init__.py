"""Latent diffusion: training, sampling and evaluation on PyTorch Lightning, WebDataset and Hydra."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    # `import ldm` must stay free of torch, which takes seconds: the command line answers mistakes without it.
    if name == "load":
        from ldm.cli.load import load

        return load
    raise AttributeError(f"module 'ldm' has no attribute {name!r}")
