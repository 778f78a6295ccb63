"""Accuracy and macro F1 against tables worked by hand."""

from collections.abc import Callable, Sequence

import pytest

from deca_node.metrics import accuracy, macro_f1

Measure = Callable[[Sequence[str], Sequence[str]], float]

TRUTH = ["a", "a", "a", "a", "b", "b", "c", "c"]
GUESS = ["a", "a", "b", "c", "b", "a", "c", "c"]


def test_accuracy_is_the_share_of_right_answers() -> None:
    """Five of the eight guesses are right."""
    assert accuracy(TRUTH, GUESS) == pytest.approx(5 / 8)


def test_macro_f1_of_a_table_worked_by_hand() -> None:
    """Each label's precision and recall, from the table of truth and guesses."""
    f1_a = 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)  # 3 guessed, 4 true, 2 right
    f1_b = 2 * (1 / 2) * (1 / 2) / (1 / 2 + 1 / 2)  # 2 guessed, 2 true, 1 right
    f1_c = 2 * (2 / 3) * (2 / 2) / (2 / 3 + 2 / 2)  # 3 guessed, 2 true, 2 right
    assert macro_f1(TRUTH, GUESS) == pytest.approx((f1_a + f1_b + f1_c) / 3)


def test_label_never_predicted_counts_as_zero() -> None:
    """Always saying the frequent label fools accuracy, not macro F1."""
    truth, guess = ["a"] * 9 + ["b"], ["a"] * 10
    assert accuracy(truth, guess) == pytest.approx(0.9)
    assert macro_f1(truth, guess) == pytest.approx((18 / 19 + 0) / 2)


def test_label_only_predicted_counts_as_zero() -> None:
    """A guess outside the true labels adds a label to the mean."""
    assert macro_f1(["a", "a"], ["a", "z"]) == pytest.approx((2 / 3 + 0) / 2)


@pytest.mark.parametrize("measure", [accuracy, macro_f1])
def test_perfect_and_hopeless(measure: Measure) -> None:
    """All right is 1, all wrong is 0."""
    assert measure(["a", "b"], ["a", "b"]) == 1.0
    assert measure(["a", "b"], ["b", "a"]) == 0.0


@pytest.mark.parametrize("measure", [accuracy, macro_f1])
def test_mismatched_or_empty_input_is_refused(measure: Measure) -> None:
    """Neither a missing prediction nor an empty test set passes for a score."""
    with pytest.raises(ValueError, match="2 true labels but 1 predictions"):
        measure(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="no predictions"):
        measure([], [])
