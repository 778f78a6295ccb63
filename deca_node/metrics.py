"""How good predictions are: pure functions of true and predicted labels; a line and its band."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass


def accuracy(truth: Sequence[str], predicted: Sequence[str]) -> float:
    """The share of predictions that are right, 0 to 1.

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    _check(truth, predicted)
    return sum(map(str.__eq__, truth, predicted)) / len(truth)


def macro_f1(truth: Sequence[str], predicted: Sequence[str]) -> float:
    """The unweighted mean over labels of F1 = 2 TP / (2 TP + FP + FN), 0 to 1.

    The labels are those that occur in ``truth`` or in ``predicted``. A label that is never
    predicted has precision 0, one that never occurs recall 0, so either counts as an F1 of 0.
    Rare labels weigh as much as frequent ones: what skewed data hides from accuracy shows here.

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    _check(truth, predicted)
    right = Counter(true for true, guess in zip(truth, predicted, strict=True) if true == guess)
    # TP + FN rows are of a label and TP + FP are taken for it: the sum is the denominator.
    total = Counter(truth) + Counter(predicted)
    return sum(2 * right[label] / total[label] for label in total) / len(total)


def _check(truth: Sequence[str], predicted: Sequence[str]) -> None:
    if len(truth) != len(predicted):
        raise ValueError(f"{len(truth)} true labels but {len(predicted)} predictions")
    if not truth:
        raise ValueError("no predictions to measure")


@dataclass(frozen=True)
class Band:
    """A line and the band around it: its mean and standard deviation at each of ``steps``.

    A value that is none is NaN, as is one that is not finite; the steps of those are ``broken``.
    """

    steps: Sequence[float]
    mean: Sequence[float]
    spread: Sequence[float]
    broken: Collection[float] = ()
