"""Mean and covariance of a set's features, in the files that the field exchanges them in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.files import replacing
from ldm.metrics.products import add_gram_, both_halves

# Features whose float64 form is held at once.
ROWS = 8192


@dataclass(frozen=True)
class Statistics:
    """Mean (D,) and unbiased covariance (D, D) of features, float64, of `count` images (None where a file is silent).

    `provenance` says what they were computed from: the feature network's `describe()`, the data's manifest hash, the
    preprocessing. It is empty for files of other projects.
    """

    mean: Tensor
    covariance: Tensor
    count: int | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        size = len(self.mean)
        if self.mean.dim() != 1 or self.covariance.shape != (size, size):
            raise ValueError(
                f"got a mean {tuple(self.mean.shape)} and a covariance {tuple(self.covariance.shape)}, expected (D,) "
                "and (D, D)"
            )

    @cached_property
    def factor(self) -> Tensor:
        """F (D, D) with the covariance as F F^T; computed once, as the real images of all evaluations are the same."""
        values, vectors = torch.linalg.eigh(self.covariance)
        # Eigenvalues below the rounding of the largest are rank deficiency, not spread.
        noise = len(values) * torch.finfo(values.dtype).eps * values.amax()
        return vectors * torch.where(values > noise, values, 0).sqrt()

    @classmethod
    def of(cls, features: Tensor, *, provenance: Mapping[str, Any] | None = None) -> Statistics:
        """Those of features (N, D), N at least 2."""
        if features.dim() != 2 or len(features) < 2:
            raise ValueError(f"got features {tuple(features.shape)}, expected (N, D) with N at least 2")
        count, size = features.shape
        outer = torch.zeros(size, size, dtype=torch.float64, device=features.device)
        mean = features.sum(dim=0, dtype=torch.float64) / count
        for block in features.split(ROWS):
            add_gram_(outer, block - mean)
        return cls(mean, both_halves(outer) / (count - 1), count, dict(provenance or {}))

    @classmethod
    def read(cls, path: Path | str, *, suffix: str = "") -> Statistics:
        """Statistics from an .npz with `mu` and `sigma`: of ADM, clean-fid, pytorch-fid, EDM or of `write`.

        Args:
            suffix: "_s" for the spatial ones (sFID) in ADM's files.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file holds no statistics of that name.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"got no reference statistics at {path}, expected an .npz with mu{suffix} and sigma{suffix}; fetch it "
                "or write it from real images, and give its place as reference"
            )
        with np.load(path, allow_pickle=False) as file:
            # A file of `write` has one pair of names, whatever the features, and says itself whose they are.
            end = "" if "provenance" in file.files else suffix
            names = (f"mu{end}", f"sigma{end}")
            if not set(names) <= set(file.files):
                raise ValueError(
                    f"got {path} with {', '.join(file.files)}, expected {' and '.join(names)}; take a file of "
                    "statistics, not of images"
                )
            mean, covariance = (torch.from_numpy(file[name].astype(np.float64)) for name in names)
            count = int(file["count"]) if "count" in file.files else None
            provenance = json.loads(str(file["provenance"])) if "provenance" in file.files else {}
        return cls(mean.squeeze(), covariance, count, provenance)

    def write(self, path: Path | str) -> None:
        """Writes an .npz that clean-fid, pytorch-fid and EDM read as it is, whole or not at all.

        ADM's evaluator wants mu_s, sigma_s and the images themselves (arr_0) in the same file besides.
        """
        arrays: dict[str, Any] = {"mu": self.mean.cpu().numpy(), "sigma": self.covariance.cpu().numpy()}
        if self.count is not None:
            arrays["count"] = np.int64(self.count)
        with replacing(path) as temporary, temporary.open("wb") as stream:
            np.savez(stream, provenance=json.dumps(dict(self.provenance), sort_keys=True), **arrays)
