"""Which of a few positive numbers, such as a loss and gradient norms, stand out from their own recent past."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The median absolute deviation of a normal distribution, times this, is its standard deviation.
_MAD_TO_DEVIATION = 1.4826


class Spikes:
    """Judges each step's values against the last `window` accepted ones, series by series, on their own device.

    A value is a spike where it exceeds `factor` times the second largest of them, so that what is rare but regular
    passes, and their median by `num_deviations` robust standard deviations (from the median absolute deviation of
    logarithms), so that noise sets its own limit. Values that are not positive are neither judged nor remembered.
    Nothing here waits for the device.

    A rejected value is remembered after all once the next one is accepted: a run of them, as when training diverges,
    never becomes the standard. A series that wakes up later than the others (a discriminator that joins) makes all of
    them start anew.

    Args:
        num_series: values a step.
        window: how many are remembered.
        num_warmup: how many must be, before any is judged.
        factor: see above.
        num_deviations: see above.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        num_series: int,
        *,
        window: int = 500,
        num_warmup: int = 200,
        factor: float = 5.0,
        num_deviations: float = 6.0,
        device: torch.device | str = "cpu",
    ) -> None:
        if not 2 <= num_warmup <= window:
            raise ValueError(f"num_warmup: got {num_warmup}, expected 2 to window={window}")
        if factor <= 1 or num_deviations <= 0:
            raise ValueError(
                f"got factor={factor}, num_deviations={num_deviations}; expected a factor above 1 and a positive number"
            )
        self.num_warmup, self.num_deviations = num_warmup, num_deviations
        self.log_factor = math.log(factor)
        self._past = torch.full((num_series, window), torch.nan, device=device)
        self._held = torch.full((num_series,), torch.nan, device=device)
        self._awake = torch.zeros(num_series, dtype=torch.bool, device=device)
        self._rejected = torch.zeros((), dtype=torch.bool, device=device)

    def judge(self, values: Tensor) -> Tensor:
        """Which of the values (num_series,) are spikes; boolean (num_series,)."""
        count = self._past.isfinite().sum(1)
        middle = (count - 1).clamp_min(0) // 2
        ordered = self._past.sort(1).values  # NaN comes last
        median = _pick(ordered, middle)
        spread = _pick((self._past - median[:, None]).abs().sort(1).values, middle)
        second = _pick(ordered, (count - 2).clamp_min(0))
        limit = torch.maximum(second + self.log_factor, median + self.num_deviations * _MAD_TO_DEVIATION * spread)
        return (count >= self.num_warmup) & (values.log() > limit) & ~self._starts_anew(values)

    def remember(self, values: Tensor, rejected: Tensor) -> None:
        """Takes in a step's values (num_series,) and whether the step was rejected, a boolean scalar."""
        anew = self._starts_anew(values)
        self._past = torch.where(anew, torch.nan, self._past)
        self._held = torch.where(anew, torch.nan, self._held)
        self._awake = self._awake | (values > 0)
        logs = values.log()
        self._push(torch.where(rejected, torch.nan, self._held))
        self._push(torch.where(rejected, torch.nan, logs))
        isolated = rejected & ~self._rejected
        self._held = torch.where(isolated, logs, torch.nan)
        self._rejected = rejected

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        tensors = {"past": self._past, "held": self._held, "awake": self._awake, "rejected": self._rejected}
        return {name: tensor.cpu().clone() for name, tensor in tensors.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Goes on from a checkpoint; one of another number of series or another window leaves this as it is."""
        if state["past"].shape != self._past.shape:
            return
        device = self._past.device
        self._past, self._held = state["past"].to(device), state["held"].to(device)
        self._awake, self._rejected = state["awake"].to(device), state["rejected"].to(device)

    def _starts_anew(self, values: Tensor) -> Tensor:
        return ((values > 0) & ~self._awake).any() & self._awake.any()

    def _push(self, logs: Tensor) -> None:
        moved = torch.cat([self._past[:, 1:], logs[:, None]], 1)
        self._past = torch.where(logs.isfinite()[:, None], moved, self._past)


def _pick(rows: Tensor, index: Tensor) -> Tensor:
    """One entry of each row (S, W) by its index (S,)."""
    return rows.gather(1, index[:, None])[:, 0]
