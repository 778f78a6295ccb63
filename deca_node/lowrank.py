"""A weighted sum of low-rank products, cut back to low rank without being formed. Pure."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Split = Literal["b", "a", "balanced"]


def refactored(
    factors: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float], split: Split
) -> tuple[Tensor, Tensor] | None:
    """The best product of rank r to stand for P = Σ_j w_j B_j A_j: its truncated SVD, as factors.

    With B = [w_1 B_1, …] = Q_B R_B and Aᵀ = [A_1ᵀ, …] = Q_A R_A (QR of thin matrices) it is
    P = Q_B (R_B R_Aᵀ) Q_Aᵀ, so that the SVD of the small core gives that of P.

    Args:
        factors: pairs of A_j, shape (r, in), and B_j, shape (out, r), of one floating dtype and
            device; r at most min(in, out).
        weights: w_j.
        split: the factor that the singular values go to; ``b``: A = Vᵀ, B = U S.

    Returns:
        A of shape (r, in) and B of shape (out, r); None when P is 0, of which there is no SVD to
        speak of, or has values that the dtype cannot hold, as of large factors.
    """
    rank = factors[0][0].shape[0]
    left = torch.cat([weight * b for (_, b), weight in zip(factors, weights, strict=True)], dim=1)
    right = torch.cat([a for a, _ in factors], dim=0).T
    if not (left.any() and right.any()):
        return None
    q_b, r_b = torch.linalg.qr(left)
    q_a, r_a = torch.linalg.qr(right)
    core = r_b @ r_a.T
    if not core.isfinite().all():
        return None
    try:
        u, s, vt = torch.linalg.svd(core, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # it does not converge
        return None
    if not 0 < s[0] < math.inf:
        return None
    b, a, s = q_b @ u[:, :rank], (q_a @ vt[:rank].T).T, s[:rank]
    if split == "b":
        b = b * s
    elif split == "a":
        a = s[:, None] * a
    else:
        b, a = b * s.sqrt(), s.sqrt()[:, None] * a
    if not (a.isfinite().all() and b.isfinite().all()):
        return None
    return a.contiguous(), b.contiguous()


def distance(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """‖B A − B' A'‖, Frobenius, of two products given as (A, B), without forming either.

    On a device that has float64.
    """
    left = torch.cat([one[1], -other[1]], dim=1).double()
    right = torch.cat([one[0], other[0]], dim=0).T.double()
    core = torch.linalg.qr(left, mode="r").R @ torch.linalg.qr(right, mode="r").R.T
    return float(torch.linalg.matrix_norm(core))
