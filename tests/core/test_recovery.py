"""Which block is fetched next from whom, who helps, and who is left alone."""

import math

import pytest

from deca_node.blocks import Schedule
from deca_node.limits import MAX_MEMBERS, MIN_TRANSFER_RATE
from deca_node.recovery import (
    LEAST_REST_SECONDS,
    MAX_BROKEN_TRIES,
    MAX_REST_SECONDS,
    MAX_VAIN_TRIES,
    Flight,
    Holdings,
    Kept,
    Need,
    Records,
    checked,
    displaced,
    next_block,
    next_rival,
    next_step,
)


def test_a_part_is_first_offered_to_whom_it_came_from():
    """A giver completes what it began, before what is new, before what others began."""
    missing = {
        block: Need(block, {name: Kept(block, 10, f"{name}{block}") for name in "ab"})
        for block in range(3)
    }
    assert next_block(missing, "a", {"b0", "a2"}) == 2
    assert next_block(missing, "b", {"b0", "a2"}) == 0
    del missing[2]
    assert next_block(missing, "a", {"b0"}) == 1
    del missing[1]
    assert next_block(missing, "a", {"b0"}) == 0  # rather than nothing
    assert next_block(missing, "c", ()) is None
    assert next_block({}, "a", ()) is None


DIGEST = "0123456789abcdef" * 2


@pytest.mark.parametrize(
    ("visit", "step", "block", "of", "nbytes", "xxh3", "wrong"),
    [
        (5, 0, 1, 4, 9, DIGEST, ""),
        (9, 0, 1, 9, 9, DIGEST, ""),  # agreed on at the end
        (2, 3, 1, 7, 9, DIGEST, ""),  # it caught up in part
        (10, 0, 1, 4, 9, DIGEST, "visit 10 of 9"),
        (5, 4, 1, 4, 9, DIGEST, "step 4 of 3"),
        (5, 0, 3, 4, 9, DIGEST, "block 3 of 3"),
        (5, 0, 1, 5, 9, DIGEST, "block 1 is not visited in visit 5"),
        (5, 0, 1, 10, 9, DIGEST, "block 1 is not visited in visit 10"),
        (5, 0, 1, 4, 0, DIGEST, "block 1 of 0 bytes"),
        (5, 0, 1, 4, 101, DIGEST, "block 1 of 101 bytes"),
        (5, 0, 1, 4, 9, "../" * 10 + "ab", "block 1 without a digest"),
        (5, 0, 1, 4, 9, DIGEST[:-1], "block 1 without a digest"),
    ],
)
def test_a_list_is_of_this_schedule_and_model(visit, step, block, of, nbytes, xxh3, wrong):
    """Whatever else it says may be true: a node keeps newer blocks that it has fetched."""
    schedule = Schedule([range(1), range(1, 2), range(2, 3)], 3, 3, "ascending", 0)
    holdings = Holdings(visit, False, {block: Kept(of, nbytes, xxh3)}, step)
    assert checked(holdings, schedule, dict.fromkeys(range(3), 100)) == wrong


def kept(nbytes=100, xxh3="x", visit=1):
    return Kept(visit, nbytes, xxh3)


def holding(visit, closed, **blocks):
    """At a visit, with blocks of these visits: b1=4 is block 1 as visit 4 left it."""
    return Holdings(visit, closed, {int(name[1:]): kept(visit=v) for name, v in blocks.items()})


@pytest.mark.parametrize(
    ("own", "versions", "others", "overtaken", "expected"),
    [
        # Visit 5 trains block 2; its edges are open, so what comes is what it will begin with.
        (2, {}, {"a": holding(5, False, b1=4, b2=2)}, False, ({1: "a", 2: "a"}, 5, None)),
        # They are fixed: its block is about to change, so it is left for when it has.
        (2, {}, {"a": holding(5, True, b1=4, b2=2)}, False, ({1: "a"}, 6, 5)),
        (2, {1: 4}, {"a": holding(5, True, b1=4, b2=2)}, False, ({}, 6, 5)),
        # One that still shakes hands may be waiting for this node.
        (2, {1: 4}, {"a": holding(5, True, b1=4), "b": holding(5, False)}, False, ({}, 5, None)),
        # Its own visit has begun without it; of a later one that says nothing.
        (5, {1: 4}, {"a": holding(5, False, b1=4)}, True, ({}, 6, 5)),
        (4, {1: 4}, {"a": holding(5, False, b1=4)}, True, ({}, 5, None)),
        # Nobody is ahead, but a block is newer there; the newest is had of whoever has it.
        (5, {0: 3}, {"a": holding(4, True, b0=3, b1=4)}, False, ({1: "a"}, 5, None)),
        (5, {}, {"a": holding(5, False, b1=1), "b": holding(5, False, b1=4)}, False,
         ({1: "b"}, 5, None)),
        (5, {}, {"a": holding(5, False, b1=4), "b": holding(5, False, b1=4)}, False,
         ({1: "ab"}, 5, None)),
        # The run is over: there is no further visit, and what was agreed on is newer than all.
        (2, {1: 7}, {"a": holding(9, True, b1=9)}, False, ({1: "a"}, 9, None)),
    ],
)  # fmt: skip
def test_who_is_behind_fetches_what_is_newer_and_enters_where_edges_are_open(
    own, versions, others, overtaken, expected
):
    schedule = Schedule([range(1), range(1, 2), range(2, 3)], 3, 3, "ascending", 0)
    step = next_step(own, versions, others, schedule, overtaken=overtaken)
    fetch = {block: "".join(sorted(need.sources)) for block, need in step.fetch.items()}
    assert (fetch, step.entry, step.wait) == expected
    assert step.done == (not fetch and step.wait is None)


@pytest.mark.parametrize(
    ("got", "left", "seconds", "patience", "slow"),
    [
        (0, 100, 9, 10, False),  # it may be waiting for its turn
        (0, 100, 11, 10, True),
        (50, 50, 11, 10, True),  # 11 more seconds
        (55, 45, 11, 10, False),  # 9 more
        (99, 1, 39, 10, False),
        (99, 1, 41, 10, True),  # overdue
        (50, 50, 1000, math.inf, False),
    ],
)
def test_a_flight_is_slow_beside_one_that_would_be_there_before_it(
    got, left, seconds, patience, slow
):
    """What counts is how long the rest will take at the pace so far."""
    assert Flight("x", got, left, seconds).is_slow(patience) is slow


def test_an_idle_giver_helps_with_what_is_under_way_longest():
    """It must have the block, and be faster than all that it comes from."""
    needs = {block: Need(block, {"a": kept(), "b": kept()}) for block in range(4)}
    needs[3] = Need(3, {"a": kept()})
    flying = {
        0: [Flight("x", 10, 90, 30.0)],
        1: [Flight("x", 10, 90, 40.0)],
        2: [Flight("x", 10, 90, 50.0), Flight("y", 10, 90, 1.0)],  # somebody helps already
        3: [Flight("x", 10, 90, 60.0)],
    }
    assert next_rival(flying, needs, "b", 10.0, 20.0) == 1
    assert next_rival(flying, needs, "b", None, 35.0) == 1
    assert next_rival(flying, needs, "b", None, 45.0) is None
    assert next_rival(flying, needs, "b", 0.1, 20.0) is None
    assert next_rival(flying, needs, "b", 0.0, 20.0) is None
    assert next_rival({}, needs, "b", 10.0, 20.0) is None
    # What is there in a moment is not worth a second giver.
    assert next_rival({0: [Flight("x", 50, 50, 1.5)]}, needs, "b", 1e6, 20.0) is None


def test_a_blocks_flights_are_two_and_of_two_versions():
    """One file is written by one flight; of three the slowest ends."""
    slow, fast = Flight("x", 1, 99, 50.0), Flight("y", 50, 50, 50.0)
    assert displaced([], "z") is None
    assert displaced([slow], "z") is None
    assert displaced([slow], "x") == 0
    assert displaced([fast, slow], "z") == 1
    assert displaced([fast, slow], "y") == 0


def tried(records, giver, begin, seconds, nbytes, **said):
    return records.tried(giver, begin, begin + seconds, nbytes, **{"whole": False, **said})


def test_who_brings_nothing_is_left_alone_for_ten_times_as_long_as_it_took():
    """A whole block, or a part of one, makes good what was in vain before."""
    records = Records()
    for nbytes, whole in ((0, False), (0, False), (5, False), (0, False), (0, False), (100, True)):
        assert not tried(records, "a", 0, 1, nbytes, whole=whole)
    assert records.resting(0) == frozenset()
    assert not tried(records, "a", 10, 30, 0)
    assert not tried(records, "a", 1000, 30, 0)
    assert tried(records, "a", 1970, 30, 0)
    assert records.resting(2000) == records.resting(2899) == {"a"}
    assert records.resting(2900) == frozenset()
    assert not tried(records, "a", 2901, 1, 0)  # it begins anew


def rest(records, begin, again):
    """How long a giver is left alone that refuses at once, ``again`` and again."""
    for _ in range(MAX_VAIN_TRIES):
        assert "a" not in records.resting(begin)
        again(records, begin)
    return next(n for n in range(10_000) if "a" not in records.resting(begin + n))


@pytest.mark.parametrize(
    "again",
    [
        lambda records, now: records.tried("a", now, now, 0, whole=False),
        lambda records, now: records.listed("a", now, now, useful=False),
    ],
)
def test_each_rest_is_twice_as_long_as_the_one_before_and_an_hour_at_most(again):
    """It costs nothing to refuse at once, but each try may cost a visit."""
    records = Records()
    rests = [rest(records, 10_000 * n, again) for n in range(8)]
    assert rests == [LEAST_REST_SECONDS * 2**n for n in range(6)] + 2 * [MAX_REST_SECONDS]
    records.tried("a", 90_000, 90_000, 5, whole=True)  # makes good what was in vain
    assert rest(records, 90_000, again) == LEAST_REST_SECONDS


def test_a_useful_list_makes_good_lists_that_did_not_come_but_no_blocks():
    """Who lists and does not give is left alone all the same."""
    records = Records()
    for n in range(MAX_VAIN_TRIES - 1):
        assert not records.listed("a", n, n + 5, useful=True)
        assert not tried(records, "a", n, 1, 0)
    assert tried(records, "a", 5, 1, 0)
    for n in range(9):
        assert not records.listed("b", n, n, useful=n % 3 == 2)


def test_who_is_false_or_stuck_rests_too():
    """Nothing that a giver does is held against it for good."""
    records = Records()
    records.false("a", 0)
    records.stuck("b", 0, 100)
    assert records.resting(599) == {"a", "b"}
    assert records.resting(600) == records.resting(1099) == {"b"}
    assert records.resting(1100) == frozenset()


def test_parts_alone_are_no_block():
    """Who brings something each time, or has no place free, is left alone in the end."""
    for nbytes, excused in ((7, False), (0, True)):
        records = Records()
        ended = [tried(records, "a", 1000 * n, 50, nbytes, excused=excused) for n in range(20)]
        assert ended == [False] * (MAX_BROKEN_TRIES - 1) + [True]
        assert records.resting(19_050 + MAX_REST_SECONDS - 1) == {"a"}
        assert records.resting(19_050 + MAX_REST_SECONDS) == frozenset()


def test_who_takes_turns_and_brings_its_share_is_not_left_alone():
    """Others queue there: what has come stays, and the rest comes in the next turns."""
    records, enough = Records(), 50 * MIN_TRANSFER_RATE
    turns = 3 * MAX_BROKEN_TRIES
    for n in range(turns):
        assert not tried(records, "a", 1000 * n, 50, enough, excused=True, size=turns * enough)
    # Too little in a turn, or more than the block has: it changes what it gives.
    for name, nbytes, size in (("b", enough - 1, turns * enough), ("a", enough, turns * enough)):
        for n in range(MAX_BROKEN_TRIES - 1):
            assert not tried(records, name, 100_000 + n, 50, nbytes, excused=True, size=size)
        assert tried(records, name, 200_000, 50, nbytes, excused=True, size=size)


def test_the_fastest_are_asked_before_the_slower_and_the_unknown_before_all():
    """Its latest try tells how fast a giver is."""
    records = Records()
    tried(records, "slow", 0, 10, 100, whole=True)
    tried(records, "fast", 0, 10, 900, whole=True)
    tried(records, "none", 0, 10, 0)
    assert records.rate("slow") == 10
    assert records.rate("new") is None
    assert records.in_order(["none", "slow", "new", "fast"]) == ["new", "fast", "slow", "none"]
    tried(records, "fast", 10, 0.001, 0, whole=True)  # all of it was there already
    assert records.rate("fast") == 90


def test_names_that_come_and_go_fill_no_table_of_givers():
    """Of many, those are kept that can give."""
    records = Records()
    for index in range(MAX_MEMBERS + 1):
        tried(records, f"n{index}", 0, 1, 1)
    records.make_room(["n3", "n9"])
    assert records.rate("n3") == records.rate("n9") == 1
    assert records.rate("n4") is None
