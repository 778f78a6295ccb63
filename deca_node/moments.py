"""The DECA step on plain tensors: Adam half-step, discrepancy, BMA fold. Pure, in place.

Equations are those of the paper (arXiv 2606.03209). All tensors are 1-D views of equal length, of
one floating dtype and device, unless said otherwise. Nothing here knows of clients but one.

Neither x nor h is stored: with x½ kept as the published snapshot,
x − x_next = (x½ − x_next) + γ m̂ / (√v̂ + ε), so that one pass takes its norm and one folds h.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

# What overflows is seen in the results; NumPy would tell of it on stderr besides.
_QUIET = np.errstate(all="ignore")

# On a CPU larger slices go through torch's thread pool, which stalls when cores are busy
# (measured: 430 ms in place of 9 for 64 MB); 128 kB of fp32 also stays in the L2 cache.
CPU_SLICE = 32_768
# On a GPU every slice costs kernel launches; 4 Mi elements keep the scratch at 16 MB a tensor.
GPU_SLICE = 4_194_304


@dataclass(frozen=True)
class Rule:
    """Constants of the update. Symbols: γ, α1, α2, ε, β1, β2 of the paper."""

    learning_rate: float
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    bma: Literal["on", "off", "trivial"] = "on"
    bma_beta1: float = 0.3
    bma_beta2: float = 0.333
    discrepancy: Literal["l2", "none", "lr", "zero"] = "l2"

    @property
    def kept(self) -> tuple[float, float]:
        """β1 and β2: the share of each local moment that survives the fold."""
        if self.bma == "off":
            return 1.0, 1.0
        if self.bma == "trivial":
            return 0.0, 0.0
        return self.bma_beta1, self.bma_beta2


def slices(tensor: Tensor) -> Iterator[slice]:
    """Consecutive slices that cover a 1-D tensor, sized for its device."""
    size = CPU_SLICE if tensor.device.type == "cpu" else GPU_SLICE
    length = tensor.numel()
    return (slice(low, min(low + size, length)) for low in range(0, length, size))


@_QUIET
def half_step(x: Tensor, gradient: Tensor, m: Tensor, v: Tensor, step: int, rule: Rule) -> None:
    """Equations (4), (5) and (6): x, m, v become x½, m½, v½.

    Args:
        x: parameters, float32 or float64, shape (P,).
        gradient: g of equation (3), shape (P,), any floating dtype.
        m: first moment, like ``x``.
        v: second moment, like ``x``.
        step: r, counted from 0 within the visit; the bias correction uses r + 1.
        rule: the constants.
    """
    for part, same in _parts(x, m, v):
        x_, m_, v_ = same
        g = _native(gradient[part].to(x.dtype))
        m_ *= rule.adam_beta1
        m_ += (1 - rule.adam_beta1) * g  # (4)
        v_ *= rule.adam_beta2
        v_ += (1 - rule.adam_beta2) * g * g  # (4)
        x_ -= _adam_step(m_, v_, step, rule)  # (5), (6)


@_QUIET
def discrepancy_norm(
    x_half: Tensor, x_next: Tensor, m: Tensor, v: Tensor, step: int, rule: Rule
) -> tuple[float, float]:
    """Norms over the slice given of what the step and the mix did.

    Args:
        x_half: x½ as published, shape (P,).
        x_next: x after the mix (7), shape (P,).
        m: m½, shape (P,).
        v: v½, shape (P,).
        step: r, from 0.
        rule: the constants.

    Returns:
        ‖x − x_next‖² (the norm of (8), squared so that slices add up) and ‖x½ − x_next‖².
    """
    total, mixed = 0.0, 0.0
    for _, (half, next_, m_, v_) in _parts(x_half, x_next, m, v):
        moved = half - next_
        mixed += _square(moved)
        moved += _adam_step(m_, v_, step, rule)
        total += _square(moved)
    return total, mixed


def mixed_square(x_half: Tensor, x_next: Tensor) -> float:
    """‖x½ − x_next‖² over the slice given: what the mix alone changed.

    Args:
        x_half: x½ as published, shape (P,).
        x_next: x after the mix (7), shape (P,).
    """
    return sum(_square(half - next_) for _, (half, next_) in _parts(x_half, x_next))


def scale(norm: float, rule: Rule) -> float:
    """The factor that turns x − x_next into h of (8); 0 where the norm is 0.

    ``l2``: 1/norm over the whole block; ``none``: 1; ``lr``: 1/γ; ``zero``: 0, so that the fold
    shrinks the moments and adds nothing.
    """
    if rule.discrepancy == "zero":
        return 0.0
    if rule.discrepancy == "l2":
        return 1 / norm if norm > 0 else 0.0
    return 1.0 if rule.discrepancy == "none" else 1 / rule.learning_rate


@_QUIET
def fold(
    x_half: Tensor, x_next: Tensor, m: Tensor, v: Tensor, step: int, rule: Rule, factor: float
) -> None:
    """Equations (8), (9) and (10): m½, v½ become m_next, v_next in place.

    Args:
        x_half: x½ as published, shape (P,).
        x_next: x after the mix (7), shape (P,).
        m: m½, shape (P,); overwritten.
        v: v½, shape (P,); overwritten.
        step: r, from 0.
        rule: the constants; with ``bma = off`` nothing changes.
        factor: from :func:`scale`.
    """
    if rule.bma == "off":
        return
    beta1, beta2 = rule.kept
    for _, same in _parts(x_half, x_next, m, v):
        half, next_, m_, v_ = same
        h = half - next_
        h += _adam_step(m_, v_, step, rule)
        h *= factor  # (8)
        m_ *= beta1
        m_ += (1 - beta1) * h  # (9)
        v_ *= beta2
        v_ += (1 - beta2) * h * h  # (10)


def _adam_step(m: Any, v: Any, step: int, rule: Rule) -> Any:
    """γ m̂ / (√v̂ + ε) of (5) and (6), newly made; the same bits each time it is asked for."""
    correction1 = 1 - rule.adam_beta1 ** (step + 1)
    correction2 = 1 - rule.adam_beta2 ** (step + 1)
    denominator = v**0.5
    denominator /= math.sqrt(correction2)
    denominator += rule.adam_eps
    moved = m / denominator
    moved *= rule.learning_rate / correction1
    return moved


def _native(values: Tensor) -> Any:
    """A view that computes fast: NumPy's on a CPU, where a call of torch's costs as much again.

    The operators above mean the same for both.
    """
    return values.numpy() if values.device.type == "cpu" else values


def _parts(*tensors: Tensor) -> Iterator[tuple[slice, list[Any]]]:
    """Slices of the first tensor, and the same part of each, to be computed with in place."""
    whole = [_native(tensor) for tensor in tensors]
    for part in slices(tensors[0]):
        yield part, [values[part] for values in whole]


def _square(values: Any) -> float:
    values = torch.as_tensor(values)
    return float(torch.dot(values, values))
