"""Mixing products of thin matrices against the dense SVD."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deca_node.lowrank import distance, refactored


def factors(count, rows, columns, rank, seed=0):
    source = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=source, dtype=torch.float64)

    return [(draw(rank, columns), draw(rows, rank)) for _ in range(count)]


def dense(pairs, weights):
    return sum(weight * b @ a for (a, b), weight in zip(pairs, weights, strict=True))


@given(
    count=st.integers(1, 6),
    rows=st.integers(1, 24),
    columns=st.integers(1, 24),
    rank=st.integers(1, 6),
    split=st.sampled_from(["b", "a", "balanced"]),
    seed=st.integers(0, 999),
)
@settings(deadline=None, max_examples=150)
def test_it_is_the_truncated_svd_of_the_dense_sum(count, rows, columns, rank, split, seed):
    """To 1e-10, whatever the shapes: also where the stacked factors are wider than the matrix."""
    rank = min(rank, rows, columns)
    pairs = factors(count, rows, columns, rank, seed)
    weights = [1 / count] * count
    whole = dense(pairs, weights)
    u, s, vt = torch.linalg.svd(whole, full_matrices=False)
    best = u[:, :rank] * s[:rank] @ vt[:rank]
    a, b = refactored(pairs, weights, split)
    assert (a.shape, b.shape) == ((rank, columns), (rows, rank))
    scale = float(s[0])
    # Where two singular values meet, several truncations are best: they are equally far from P.
    gap = float(s[rank - 1] - s[rank]) / scale if rank < len(s) else 1.0
    if gap > 1e-4:
        assert float((b @ a - best).abs().max()) < 1e-10 * scale
    error = torch.linalg.matrix_norm(whole - b @ a)
    assert abs(float(error - s[rank:].square().sum().sqrt())) < 1e-10 * scale


@pytest.mark.parametrize("split", ["b", "a", "balanced"])
def test_the_singular_values_go_where_they_should(split):
    """The other factor is orthonormal; balanced, both have the same Gram matrix."""
    pairs = factors(3, 20, 13, 4)
    a, b = refactored(pairs, [0.5, 0.25, 0.25], split)
    s = torch.linalg.svdvals(dense(pairs, [0.5, 0.25, 0.25]))[:4]
    one = torch.eye(4, dtype=torch.float64)
    grams = {
        "b": (one, torch.diag(s**2)),
        "a": (torch.diag(s**2), one),
        "balanced": (torch.diag(s), torch.diag(s)),
    }
    torch.testing.assert_close(a @ a.T, grams[split][0])
    torch.testing.assert_close(b.T @ b, grams[split][1])


def test_nothing_to_factor_is_told():
    """Before the first step every B is 0, and so may be the sum of opposite products."""
    pairs = factors(2, 8, 6, 2)
    assert refactored([(a, torch.zeros_like(b)) for a, b in pairs], [0.5, 0.5], "b") is None
    # Products that float32 does not tell from 0: balanced, both factors would be 0 for good.
    tiny = [(1e-30 * a.float(), 1e-30 * b.float()) for a, b in pairs]
    assert refactored(tiny, [0.5, 0.5], "balanced") is None


@pytest.mark.parametrize("split", ["b", "a", "balanced"])
@pytest.mark.parametrize("size", [1e18, 1e20, 3e38, math.inf, math.nan])
def test_what_is_no_product_of_finite_numbers_is_told(size, split):
    """A neighbour may send any finite float32: its product is factored or not, never an error."""
    own, other = ((a.float(), b.float()) for a, b in factors(2, 8, 6, 2))
    found = refactored([own, tuple(size * t.clamp(-1, 1) for t in other)], [0.5, 0.5], split)
    if size > 1e18 or math.isnan(size):
        assert found is None
    else:
        assert all(bool(each.isfinite().all()) for each in (*found, found[1] @ found[0]))


def test_directions_without_a_value_stay_alive_in_a():
    """Where P has a lower rank than r, A keeps r orthonormal rows, so that B can grow again."""
    (a, b), *_ = factors(1, 9, 7, 3)
    b[:, 1:] = 0
    new_a, new_b = refactored([(a, b)], [1.0], "b")
    torch.testing.assert_close(new_a @ new_a.T, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(new_b @ new_a, b @ a)


def test_the_distance_is_that_of_the_dense_products():
    """And 0 for the same product in other factors, but for rounding."""
    one, other = factors(2, 15, 11, 3)
    expected = torch.linalg.matrix_norm(one[1] @ one[0] - other[1] @ other[0])
    assert distance(one, other) == pytest.approx(float(expected), rel=1e-12)
    turned = refactored([one], [1.0], "balanced")
    assert distance(one, turned) < 1e-12 * float(torch.linalg.matrix_norm(one[1] @ one[0]))


def test_the_balanced_split_lets_directions_die():
    """Why it is not the default: both factors lose a direction without a value, for good."""
    (a, b), *_ = factors(1, 9, 7, 3)
    b[:, 1:] = 0
    new_a, new_b = refactored([(a, b)], [1.0], "balanced")
    assert float(new_a[1:].norm()) < 1e-6
    assert float(new_b[:, 1:].norm()) < 1e-6
