"""Counting what a computation takes without doing it: arithmetic, memory traffic, kernels, and memory held."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils.flop_counter import flop_registry

# Kinds of arithmetic; what is none of these is element-wise, and costs traffic alone.
CONVOLUTION, LINEAR, ATTENTION = "convolution", "linear", "attention"

# What CUDA's autocast computes in 16 bits, and what in float32 (torch's table of autocast operators).
_LOW = {
    *(F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose2d, torch.conv1d, torch.conv2d, torch.conv3d),
    *(torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.addbmm, torch.einsum, F.bilinear),
    *(Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm, Tensor.addmm, Tensor.baddbmm),
}
_FLOAT32 = {
    *(F.layer_norm, F.group_norm, F.softmax, torch.softmax, F.log_softmax, F.mse_loss, F.l1_loss, torch.cumsum),
    *(torch.layer_norm, torch.group_norm, torch.norm, torch.exp, torch.log, torch.pow, torch.rsqrt, torch.sum),
    *(Tensor.softmax, Tensor.norm, Tensor.exp, Tensor.log, Tensor.pow, Tensor.rsqrt, Tensor.sum, Tensor.cumsum),
    *(torch.cosine_similarity, torch.cdist, torch.prod, Tensor.prod, F.softplus, torch.reciprocal, F.smooth_l1_loss),
}


@dataclass(frozen=True)
class Amount:
    """What a computation takes, in all.

    Args:
        flops: by kind: convolution, linear, attention; a multiply-add is two.
        traffic: bytes read and written by everything that is not arithmetic of these kinds, unfused.
        kernels: operators that compute something.
        kept: bytes alive at its end that were not at its start.
        peak: the most bytes alive during it, less those at its start.
    """

    flops: dict[str, float] = field(default_factory=dict)
    traffic: float = 0.0
    kernels: float = 0.0
    kept: float = 0.0
    peak: float = 0.0

    @property
    def total(self) -> float:
        """All floating-point operations."""
        return sum(self.flops.values())

    def plus(self, other: Amount) -> Amount:
        """This and then the other; what is kept adds up, of peaks the higher one counts."""
        return Amount(
            {kind: self.flops.get(kind, 0) + other.flops.get(kind, 0) for kind in {**self.flops, **other.flops}},
            self.traffic + other.traffic,
            self.kernels + other.kernels,
            self.kept + other.kept,
            max(self.peak, other.peak),
        )

    def less(self, other: Amount) -> Amount:
        """What this takes beyond the other."""
        return self.plus(other.times(-1.0))

    def times(self, factor: float) -> Amount:
        """So many of it, side by side; the number of kernels stays for positive factors of a batch: see `Line`."""
        flops = {kind: factor * flops for kind, flops in self.flops.items()}
        return Amount(flops, factor * self.traffic, factor * self.kernels, factor * self.kept, factor * self.peak)


@dataclass(frozen=True)
class Line:
    """What a computation takes as a function of the batch size: a fixed part, and one for each sample."""

    fixed: Amount = field(default_factory=Amount)
    each: Amount = field(default_factory=Amount)

    def at(self, batch: float) -> Amount:
        """The amount for a batch of this size."""
        grown = self.each.times(batch)
        whole = self.fixed.plus(grown)
        return Amount(whole.flops, whole.traffic, whole.kernels, whole.kept, self.fixed.peak + grown.peak)

    @staticmethod
    def through(count: Callable[[int], Amount], *, sizes: tuple[int, int] = (8, 16)) -> Line:
        """The line through the amounts of two batch sizes."""
        small, large = (count(size) for size in sizes)
        span = 1 / (sizes[1] - sizes[0])
        flops = {kind: (large.flops.get(kind, 0) - small.flops.get(kind, 0)) * span for kind in large.flops}
        each = Amount(
            flops,
            (large.traffic - small.traffic) * span,
            (large.kernels - small.kernels) * span,
            (large.kept - small.kept) * span,
            (large.peak - small.peak) * span,
        )
        first = sizes[0]
        fixed = Amount(
            {kind: small.flops.get(kind, 0) - first * flops[kind] for kind in flops},
            small.traffic - first * each.traffic,
            small.kernels - first * each.kernels,
            small.kept - first * each.kept,
            small.peak - first * each.peak,
        )
        return Line(fixed, each)


class Meter(TorchDispatchMode):
    """Counts every operator inside it, on any device; on "meta" nothing is computed.

    FLOPs are those of torch's own registry (`torch.utils.flop_counter`). Memory is the storages that come and go.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[str] = Counter()
        self.traffic = self.kernels = 0
        self.alive = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = _tensors(args) + _tensors(kwargs.values()) if kwargs else _tensors(args)
        for tensor in inputs:
            self._watch(tensor, held=False)
        out = func(*args, **(kwargs or {}))
        outputs = _tensors((out,))
        packet = func._overloadpacket
        if packet in flop_registry:
            self.flops[_kind(packet.__name__)] += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
            self.kernels += 1
        elif not self._is_view(inputs, outputs):
            self.traffic += sum(t.numel() * t.element_size() for t in [*inputs, *outputs])
            self.kernels += 1
        for tensor in outputs:
            self._watch(tensor, held=True)
        return out

    def amount(self) -> Amount:
        """What was counted."""
        return Amount(dict(self.flops), self.traffic, self.kernels, self.alive, self.peak)

    def _is_view(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
        """Whether nothing is computed: outputs share the storage of an input, or do not depend on any."""
        if not outputs or not inputs:
            return True
        theirs = {_key(tensor) for tensor in inputs}
        shares = all(_key(tensor) in theirs for tensor in outputs)
        return shares and not any(out is one for out in outputs for one in inputs)

    def _watch(self, tensor: Tensor, *, held: bool) -> None:
        """Follows a storage until it goes; one that was there before counts for nothing."""
        storage = tensor.untyped_storage()
        key: int = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if held else 0
        self._known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


class Precision(TorchFunctionMode):
    """Casts as CUDA's autocast does, and attends as its fused kernels do: on devices that know neither.

    Args:
        dtype: of products, by the trainer's precision; None keeps float32.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dtype = dtype
        self._weights: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key, value = (self._low(tensor) for tensor in args[:3])
            return FusedAttention.apply(query, key, value)
        if self.dtype is not None and func in _LOW:
            args, kwargs = self._cast(args, self._low), self._cast(kwargs, self._low)
        elif self.dtype is not None and func in _FLOAT32:
            args, kwargs = self._cast(args, _float32), self._cast(kwargs, _float32)
        return func(*args, **kwargs)

    def _cast(self, values: Any, cast_one: Callable[[Tensor], Tensor]) -> Any:
        if isinstance(values, dict):
            return {name: self._cast(value, cast_one) for name, value in values.items()}
        if isinstance(values, tuple | list):
            return type(values)(self._cast(value, cast_one) for value in values)
        return cast_one(values) if isinstance(values, Tensor) else values

    def _low(self, tensor: Tensor) -> Tensor:
        if self.dtype is None or tensor.dtype != torch.float32:
            return tensor
        if not (tensor.is_leaf and tensor.requires_grad):
            return tensor.to(self.dtype)
        if id(tensor) not in self._weights:
            self._weights[id(tensor)] = tensor.to(self.dtype)
        return self._weights[id(tensor)]


class FusedAttention(torch.autograd.Function):
    """The products and the memory of a fused attention kernel; its result has the shape of the true one alone."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Two products: scores, and values weighted by them."""
        q, k, v = (tensor.flatten(0, -3) for tensor in (query, key, value))
        with _unwatched():
            products = (torch.bmm(q, k.mT), torch.bmm(q.new_empty(len(q), q.shape[1], k.shape[1]), v))
        del products
        # Laid out token by token, as the kernels do, so that joining the heads copies nothing.
        out = query.new_empty(*query.shape[:-3], query.shape[-2], query.shape[-3], value.shape[-1]).transpose(-3, -2)
        # What the kernels keep of the softmax: one float32 a row.
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Four products; the scores' recomputation is the kernel's own and not counted."""
        query, key, value, *_ = ctx.saved_tensors
        q, k, v = (tensor.flatten(0, -3) for tensor in (query, key, value))
        g = q.new_empty(len(q), q.shape[1], v.shape[-1])
        with _unwatched():
            scores = q.new_empty(len(q), q.shape[1], k.shape[1])
            products = (torch.bmm(g, v.mT), torch.bmm(scores.mT, g), torch.bmm(scores, k), torch.bmm(scores.mT, q))
        del products, scores
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@contextmanager
def _also_in_backward(precision: Precision) -> Iterator[None]:
    """Puts modules that a backward pass computes again, where modes of functions are off, under the precision too."""
    entered: list[nn.Module] = []

    def enter(module: nn.Module, inputs: Any) -> None:
        if precision not in _get_current_function_mode_stack():
            entered.append(module)
            precision.__enter__()

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        if entered and entered[-1] is module:
            entered.pop()
            precision.__exit__(None, None, None)

    handles = [
        register_module_forward_pre_hook(enter),
        # Also where checkpointing stops a recomputation half-way, by an exception.
        register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _unwatched() -> Iterator[None]:
    """Keeps what a fused kernel holds on its chip out of the memory in use, and its products as one kernel."""
    meters = [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, Meter)]
    before = [(meter.peak, meter.kernels, meter.traffic) for meter in meters]
    for meter in meters:
        meter.peak = 0
    yield
    for meter, (peak, kernels, traffic) in zip(meters, before, strict=True):
        meter.peak, meter.kernels, meter.traffic = peak, kernels + 1, traffic


def _kind(operator: str) -> str:
    """The kind of an operator's arithmetic: products of batches of matrices are those of attention."""
    if "convolution" in operator:
        return CONVOLUTION
    return ATTENTION if "attention" in operator or operator in ("bmm", "baddbmm") else LINEAR


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among values and in lists of them."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _key(tensor: Tensor) -> int:
    return cast(int, tensor.untyped_storage()._cdata)


def forward_amount(compute: Callable[[], Any], *, dtype: torch.dtype | None, grad: bool = False) -> Amount:
    """What a forward pass takes."""
    with Meter() as meter, Precision(dtype), nullcontext() if grad else torch.no_grad():
        result = compute()
        amount = meter.amount()
    del result
    return amount


def step_amounts(
    compute: Callable[[], Tensor], *, dtype: torch.dtype | None, parameters: Sequence[Tensor]
) -> tuple[Amount, Amount]:
    """What a forward pass takes, and what it and its backward pass take.

    Gradients count as there before: of a pass, only those of one operator are alive beside them.
    """
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    precision = Precision(dtype)
    with Meter() as meter, _also_in_backward(precision), precision:
        loss = compute()
        forward = meter.amount()
        loss.backward()
        amount = meter.amount()
    for parameter in parameters:
        parameter.grad = None
    return forward, amount
