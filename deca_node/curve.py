"""The curve of a run in a bounded number of points, however many steps it has. Pure."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """Steps ``first`` to ``last`` of the whole run, numbered as the schedule does (serial).

    The values are means over these steps, NaN where none was finite; ``seconds`` of a step. When
    points are joined each weighs as many steps as it has, finite or not.
    """

    first: int
    last: int
    loss: float
    gradient_norm: float
    h_norm: float
    disagreement: float
    seconds: float


VALUES = ("loss", "gradient_norm", "h_norm", "disagreement", "seconds")


class Curve:
    """Points in the order of their steps, at most ``limit`` of them.

    Steps are joined in groups whose size, a power of two, doubles whenever the limit is reached; a
    group is the same steps on every node, so that the curves of several lie over each other.

    Args:
        limit: at least 2.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._stride = 1
        self._points: list[Point] = []

    def __len__(self) -> int:
        return len(self._points)

    @property
    def last(self) -> int | None:
        """The last step of all; None before the first."""
        return self._points[-1].last if self._points else None

    def add(self, point: Point) -> None:
        """Add what comes next; steps that are done again take the place of what they were."""
        while self._points and self._points[-1].last >= point.first:
            self._points.pop()
        self._points.append(point)
        if len(self._points) > 1 and self._is_one(*self._points[-2:]):
            self._points[-2:] = [_joined(*self._points[-2:])]
        if len(self._points) > self._limit:
            self._stride = _stride(self._points, self._stride, self._limit)
            self._points = _grouped(self._points, self._stride)

    def _is_one(self, earlier: Point, later: Point) -> bool:
        return earlier.first // self._stride == later.last // self._stride

    def points(self, after: int | None = None, limit: int | None = None) -> list[Point]:
        """What is known of the steps after step ``after``, of all when it is None.

        A point that was still growing when it was given out comes again as a whole, so that the
        receiver puts it in the place of what it overlaps.

        Args:
            after: the last step that the asker has seen.
            limit: return at most so many points; the curve's own when it is None.
        """
        new = [point for point in self._points if after is None or point.last > after]
        if limit is None or len(new) <= limit:
            return new
        return _grouped(new, _stride(new, self._stride, max(limit, 2)))


def _stride(points: Sequence[Point], stride: int, limit: int) -> int:
    """The smallest doubling of ``stride`` with which the points are few enough."""
    while len({point.first // stride for point in points}) > limit:
        stride *= 2
    return stride


def _grouped(points: Iterable[Point], stride: int) -> list[Point]:
    groups: list[Point] = []
    for point in points:
        if groups and groups[-1].first // stride == point.first // stride:
            groups[-1] = _joined(groups[-1], point)
        else:
            groups.append(point)
    return groups


def _joined(a: Point, b: Point) -> Point:
    sizes = a.last - a.first + 1, b.last - b.first + 1
    means = {name: _mean(sizes, (getattr(a, name), getattr(b, name))) for name in VALUES}
    return Point(a.first, b.last, **means)


def _mean(sizes: tuple[int, int], values: tuple[float, float]) -> float:
    pairs = [(size, value) for size, value in zip(sizes, values, strict=True)]
    finite = [(size, value) for size, value in pairs if math.isfinite(value)]
    total = sum(size for size, _ in finite)
    return sum(size * value for size, value in finite) / total if finite else math.nan
