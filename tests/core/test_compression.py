"""Quantised differences: error bounds, extremes, and error feedback that forgets nothing."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from deca_node.compression import (
    BF16_MAX,
    FLOAT_MAX,
    INT8_BLOCK,
    MAX_SCALE_BITS,
    Format,
    advance,
    agreed,
    are_finite,
    are_scales,
    from_bf16,
    from_int8,
    scale_count,
    subtract,
    to_bf16,
    to_int8,
)

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
SIZES = st.integers(1, 2 * INT8_BLOCK + 3)
VALUES = SIZES.flatmap(lambda size: arrays.arrays(np.float32, size, elements=FINITE))


def random_values(size, seed=0, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


def there_and_back(format_, values):
    if format_ is Format.BF16:
        return from_bf16(to_bf16(values))
    return from_int8(*to_int8(values))


def test_an_edge_gets_the_more_compressed_wish():
    """Both ends derive the same format, whichever of them asks."""
    for one, other in product(Format, Format):
        assert agreed(one, other) is agreed(other, one)
        assert agreed(one, other) in (one, other)
    assert agreed(Format.FP32, Format.INT8) is Format.INT8
    assert agreed(Format.INT8, Format.BF16) is Format.INT8
    assert agreed(Format.FP32, Format.FP32) is Format.FP32


def test_bf16_rounds_to_nearest_and_ties_to_even():
    """Halfway between two numbers the even one is taken, else the nearer."""
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0xBF818000], np.uint32)
    assert to_bf16(bits.view(np.float32)).tolist() == [0x3F80, 0x3F82, 0x3F81, 0x3F80, 0xBF82]


@pytest.mark.parametrize("size", [1, 255, 256, 257, 32_768, 32_769, 100_001])
def test_int8_is_off_by_half_a_scale_at_most(size):
    """Any length: scales are peaks over 127, no more than a bf16 step above."""
    values = random_values(size, scale=1e-4)
    bits, quantised = to_int8(values)
    assert len(bits) == scale_count(size)
    scales = np.repeat(from_bf16(bits), INT8_BLOCK)[:size]
    assert (np.abs(from_int8(bits, quantised) - values) <= scales / 2 * (1 + 1e-5)).all()
    padded = np.pad(np.abs(values), (0, -size % INT8_BLOCK)).reshape(-1, INT8_BLOCK).max(1)
    assert (from_bf16(bits) >= padded / 127 * (1 - 1e-6)).all()
    assert (from_bf16(bits) <= padded / 127 * (1 + 2**-7)).all()


@pytest.mark.parametrize("first", [0, 1, 255, 256, 300, 40_000])
@pytest.mark.parametrize("count", [1, 255, 256, 33_000])
def test_any_stretch_of_int8_values_is_read_with_its_own_scales(first, count):
    """A message may begin and end within a block of 256."""
    bits, quantised = to_int8(random_values(80_000) * np.arange(80_000, dtype=np.float32))
    whole = from_int8(bits, quantised)
    part = from_int8(bits, quantised[first : first + count], first)
    assert np.array_equal(part, whole[first : first + count])


def test_a_block_of_zeros_stays_zero_beside_others():
    """Its scale is 0, and no division makes a NaN of it."""
    values = np.zeros(3 * INT8_BLOCK, np.float32)
    values[0], values[-1] = 3.0, -5.0
    bits, quantised = to_int8(values)
    assert bits[1] == 0
    back = from_int8(bits, quantised)
    assert not back[INT8_BLOCK:-INT8_BLOCK].any()
    assert back[0] == pytest.approx(3.0, rel=1e-2)


EXTREMES = (FLOAT_MAX, -FLOAT_MAX, BF16_MAX, 1e-45, -1e-45, 1e-40, 1.17e-38, 0.0, -0.0, 1.0)


@pytest.mark.parametrize("format_", [Format.BF16, Format.INT8])
def test_finite_values_never_become_anything_else(format_):
    """The largest and the smallest numbers of float32, alone and beside each other."""
    for pair in product(EXTREMES, EXTREMES):
        values = np.array(pair, np.float32)
        with np.errstate(all="raise", under="ignore"):
            back = there_and_back(format_, values)
        assert np.isfinite(back).all(), pair
        assert np.allclose(back, values, rtol=0.02, atol=np.abs(values).max() / 120 + 1e-40)


@given(VALUES)
@settings(max_examples=200, deadline=None)
def test_what_is_made_passes_the_receivers_checks(values):
    """Scales are neither negative nor too large, and all that is made of them is finite."""
    bits, quantised = to_int8(values)
    assert are_scales(bits)
    assert are_finite(bits)
    assert np.isfinite(from_int8(bits, quantised)).all()
    assert are_finite(to_bf16(values))


def test_what_can_be_no_scale_is_told():
    """Negative, infinite, NaN, and one step above the largest."""
    for bad in (0x8000, 0xBF80, 0x7F80, 0x7FC0, 0xFFFF, MAX_SCALE_BITS + 1):
        assert not are_scales(np.array([0, bad], np.uint16))
    assert are_scales(np.array([0, MAX_SCALE_BITS], np.uint16))
    assert not are_finite(np.array([0x7F80], np.uint16))
    assert not are_finite(np.array([0xFFC0], np.uint16))


@pytest.mark.parametrize("format_", [Format.BF16, Format.INT8])
def test_both_ends_hold_the_same_bits_and_nothing_is_forgotten(format_):
    """After many steps of a moving x both references are equal, one message's error from x."""
    x = torch.from_numpy(random_values(5000))
    sender, receiver = x.clone(), x.clone()
    for step in range(200):
        x += torch.from_numpy(random_values(5000, step + 1, scale=1e-4))
        difference = subtract(x, sender)
        message = torch.from_numpy(there_and_back(format_, difference.numpy()))
        moved = torch.empty_like(sender)
        advance(sender, message, moved)
        sender = moved
        advance(receiver, message, receiver)
        assert torch.equal(sender, receiver)
        error = float((x - sender).abs().max())
        bound = float(difference.abs().max()) * (2**-8 if format_ is Format.BF16 else 1 / 250)
        assert error <= bound + 2 * torch.finfo(torch.float32).eps * float(x.abs().max())


@pytest.mark.parametrize("format_", [Format.BF16, Format.INT8])
def test_a_steady_x_is_reached(format_):
    """Error feedback sends what earlier messages left out, until nothing is left."""
    x = torch.from_numpy(random_values(3000))
    reference = torch.zeros_like(x)
    for _ in range(6):
        message = there_and_back(format_, subtract(x, reference).numpy())
        advance(reference, torch.from_numpy(message), reference)
    assert float((x - reference).abs().max()) <= 1e-7 * 4


def test_references_at_both_ends_of_float32_stay_finite():
    """Differences and sums saturate."""
    high, low = torch.full((3,), FLOAT_MAX), torch.full((3,), -FLOAT_MAX)
    for far, near in ((high, low), (low, high)):
        difference = subtract(far, near)
        assert bool(difference.isfinite().all())
        after = torch.empty_like(far)
        advance(far, difference, after)
        assert torch.equal(after, far)
