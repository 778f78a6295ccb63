"""Curves in a bounded number of points."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deca_node.curve import Curve, Point


def _step(serial: int, loss: float = 1.0) -> Point:
    return Point(serial, serial, loss, 2.0, 1.0, 0.5, 0.1)


def _covered(points: list[Point]) -> list[int]:
    return [serial for point in points for serial in range(point.first, point.last + 1)]


@settings(deadline=None)
@given(st.integers(2, 40), st.integers(1, 600))
def test_every_step_is_in_one_point_and_the_points_are_few(limit: int, steps: int) -> None:
    curve = Curve(limit)
    for serial in range(steps):
        curve.add(_step(serial, float(serial)))
    points = curve.points()
    assert len(points) <= limit
    assert len(points) >= min(steps, limit / 2 - 1)
    assert _covered(points) == list(range(steps))
    for point in points:  # the mean of 0, 1, 2, ... over the point's steps
        assert math.isclose(point.loss, (point.first + point.last) / 2, abs_tol=1e-9)


@settings(deadline=None)
@given(st.integers(2, 40), st.integers(1, 300), st.integers(0, 300))
def test_who_asks_again_and_again_ends_with_the_same_curve(
    limit: int, steps: int, asked: int
) -> None:
    """The receiver puts what it gets in the place of what it overlaps (Curve.add does)."""
    curve, copy = Curve(limit), Curve(2000)
    for serial in range(steps):
        curve.add(_step(serial))
        if serial in (asked, asked // 2):
            for point in curve.points(copy.last):
                copy.add(point)
    for point in curve.points(copy.last):
        copy.add(point)
    assert _covered(copy.points()) == list(range(steps))


def test_an_answer_can_be_thinner_than_the_curve() -> None:
    curve = Curve(100)
    for serial in range(64):
        curve.add(_step(serial))
    assert [(p.first, p.last) for p in curve.points(limit=4)] == [
        (0, 15),
        (16, 31),
        (32, 47),
        (48, 63),
    ]
    assert len(curve) == 64
    assert curve.points(63) == []


def test_steps_that_are_done_again_replace_what_they_were() -> None:
    """A node that resumes from its state repeats the steps since then."""
    curve = Curve(10)
    for serial in range(6):
        curve.add(_step(serial, 5.0))
    curve.add(_step(3, 1.0))
    assert [point.loss for point in curve.points()] == [5.0, 5.0, 5.0, 1.0]
    assert curve.last == 3


def test_groups_are_the_same_steps_on_every_node() -> None:
    """Also on one that came late: curves of several nodes lie over each other."""
    early, late = Curve(8), Curve(8)
    for serial in range(40):
        early.add(_step(serial))
        if serial >= 13:
            late.add(_step(serial))
    starts = {point.first for point in early.points()}
    assert {point.first for point in late.points(limit=5)[1:]} <= starts


def test_what_is_not_finite_is_left_out_of_a_mean() -> None:
    curve = Curve(2)
    for serial, loss in enumerate((math.nan, math.inf, 3.0, 3.0, 1.0, math.nan, 2.0, -math.inf)):
        curve.add(_step(serial, loss))
    first, second = curve.points()
    assert (first.loss, second.loss) == (3.0, pytest.approx(4 / 3))
    curve = Curve(4)
    curve.add(_step(0, math.nan))
    assert math.isnan(curve.points()[0].loss)
