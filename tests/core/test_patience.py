"""Whom a node waits for, and until when."""

import pytest

from deca_node.config import Timing
from deca_node.patience import DOUBTFUL_SECONDS, RETRY_SECONDS, Patience, to_come

TIMING = Timing.lan()
DEADLINE = 100 + TIMING.step_deadline


def patience(*suspects):
    return Patience(TIMING, lambda peer: peer in suspects)


@pytest.mark.parametrize(
    ("about", "seconds"),
    [
        ("", TIMING.visit_deadline),
        ("down", TIMING.visit_deadline),  # heard since: only a suspect's connection counts
        ("suspect", TIMING.rpc),
        ("idle", TIMING.rpc),
        ("idle suspect", TIMING.rpc),
        ("suspect down", TIMING.redial),
        ("idle suspect down", RETRY_SECONDS),
    ],
)
def test_a_visit_begins_without_those_that_will_hardly_come(about, seconds):
    """A living peer has the deadline; a dead one the time of a new connection, once."""
    known = {word: word in about.split() for word in ("idle", "suspect", "down")}
    assert to_come(TIMING, **known) == seconds


def test_who_was_late_or_slow_or_fails_holds_nobody_up():
    """Until the next visit, or until a block of theirs is here in time."""
    held = patience("c")
    held.missed("a")
    held.used_up("b")
    assert held.worth("abcd") == {"d"}
    held.came("a")
    assert held.worth("abcd") == {"a", "d"}
    held.missed("d")
    held.begin_visit()
    assert held.worth("abcd") == {"a", "b", "d"}


def test_a_step_waits_for_several_to_its_deadline_and_for_the_last_within_its_budget():
    """Those that are not worth waiting for get a moment, from when nothing else is to be done."""
    held = patience()
    held.waited(["a"], TIMING.wait_budget - 2)
    assert held.for_blocks({"a", "b"}, DEADLINE, 100, 101) == DEADLINE
    assert held.for_blocks({"a"}, DEADLINE, 100, 101) == 103
    assert held.for_blocks({"b"}, DEADLINE, 100, 101) == DEADLINE  # all of its budget is longer
    assert held.for_blocks(set(), DEADLINE, 100, 101) == 100 + DOUBTFUL_SECONDS
    assert held.for_blocks(set(), 100.1, 100, 101) == 100.1
    held.waited("ab", 3)
    assert held.for_blocks({"a"}, DEADLINE, 100, 101) == 101  # used up is not owed
    held.begin_visit()
    assert held.for_blocks({"a"}, DEADLINE, 100, 101) == DEADLINE


def test_readers_are_waited_for_out_of_the_same_budget():
    """The longest budget counts; who has not even asked is given one call's time."""
    held = patience()
    held.waited("ab", TIMING.wait_budget - 2)
    assert held.for_readers({"a"}, 100, 101, asked=True) == 103
    assert held.for_readers({"a", "c"}, 100, 101, asked=True) == DEADLINE
    assert held.for_readers({"a", "c"}, 100, 101, asked=False) == 100 + TIMING.rpc
    assert held.for_readers({"a"}, 100, 101, asked=False) == 103


def test_who_is_held_up_in_the_agreement_is_given_a_calls_time_more():
    """Else its deadline and that of who waits for it fall together."""
    assert patience().for_agreement(set(), DEADLINE) == DEADLINE
    assert patience().for_agreement({"a"}, DEADLINE) == DEADLINE + TIMING.rpc
