"""What is done to a swarm next: bounds that hold whatever is drawn."""

import random
from collections import Counter

import pytest

from deca_node.faults import (
    JOIN_BY,
    LAST_SECONDS,
    SECONDS,
    Kind,
    Roster,
    most_down,
    next_fault,
    pause,
)

END = 600.0


def decide(seed, roster, now=1.0, end=END):
    return next_fault(random.Random(seed), roster, now, end)[0]


def play(seed, nodes=5, joiners=2, end=END, recover=6.0):
    """A whole run in which a started node makes its first step after ``recover`` seconds.

    Yields every fault with its time and how the nodes stood just before it.
    """
    draw = random.Random(seed)
    names = [f"node-{i}" for i in range(nodes + joiners)]
    absent = names[nodes:]
    steady_from = dict.fromkeys(names[:nodes], 0.0)
    healed_at, spared = {}, set()
    now = due = 0.0
    while now < end:
        now += 0.25
        for name in [name for name, at in healed_at.items() if at <= now]:
            del healed_at[name]
        spared -= {name for name, at in steady_from.items() if at <= now}
        if now < due:
            continue
        well = [name for name in steady_from if name not in healed_at]
        back = [name for name in well if steady_from[name] > now]
        roster = Roster(
            steady=tuple(name for name in well if name not in back),
            recovering=tuple(name for name in back if name not in spared),
            spared=tuple(name for name in back if name in spared),
            faulty=tuple(healed_at),
            absent=tuple(absent),
        )
        fault, _ = next_fault(draw, roster, now, end)
        if fault is None:
            continue
        yield now, fault, roster
        due = now + pause(draw)
        if fault.kind == Kind.JOIN:
            absent.remove(fault.node)
            steady_from[fault.node] = now + recover
            continue
        healed_at[fault.node] = now + fault.seconds
        if fault.node in back:
            spared.add(fault.node)
        if fault.kind in (Kind.KILL, Kind.RESTART):
            steady_from[fault.node] = now + fault.seconds + recover


@pytest.mark.parametrize("seed", range(50))
def test_somebody_is_always_left_alone(seed):
    """A steady node remains beside the victim, and no more than half are brought down."""
    for _, fault, roster in play(seed, nodes=2 + seed % 5):
        if fault.kind == Kind.JOIN:
            continue
        assert fault.node in (*roster.steady, *roster.recovering)
        steady = set(roster.steady) - {fault.node}
        assert steady
        if fault.node in roster.steady:
            present = len(roster.present)
            assert present - len(steady) <= most_down(present)


@pytest.mark.parametrize("seed", range(20))
def test_a_node_on_its_way_back_is_hurt_once(seed):
    """Then it is left to come back, however many faults there are."""
    hurt = Counter()
    for _, fault, roster in play(seed, recover=40.0):
        for name in roster.steady:
            hurt[name] = 0
        hurt[fault.node] += 1
        assert hurt[fault.node] <= 2  # what sent it there, and once on the way


@pytest.mark.parametrize("seed", range(20))
def test_everything_is_healed_before_the_end(seed):
    """No fault begins shortly before it or lasts beyond it."""
    for now, fault, _ in play(seed, end=60.0):
        assert now <= 60.0 - LAST_SECONDS
        assert now + fault.seconds <= 60.0 + 1e-9


@pytest.mark.parametrize("seed", range(20))
def test_every_joiner_comes_in_time(seed):
    joins = [(now, fault.node) for now, fault, _ in play(seed) if fault.kind == Kind.JOIN]
    assert [node for _, node in joins] == ["node-5", "node-6"]
    assert all(now <= JOIN_BY * END + 15 for now, _ in joins)


def test_half_an_hour_holds_hundreds_of_faults_of_every_kind():
    """At least 200, as issue and docs promise, with lengths all over their ranges."""
    faults = [fault for _, fault, _ in play(7, end=1800.0)]
    counts = Counter(fault.kind for fault in faults)
    assert counts.total() >= 200
    assert all(counts[kind] >= 20 for kind in Kind if kind != Kind.JOIN)
    for kind, (low, high) in SECONDS.items():
        lengths = [fault.seconds for fault in faults if fault.kind == kind]
        assert low <= min(lengths) < 2 * low
        assert high / 2 < max(lengths) <= high


def test_a_seed_gives_the_same_faults():
    assert list(play(3)) == list(play(3))
    assert list(play(3)) != list(play(4))


def test_the_last_one_standing_is_not_touched():
    """Whether the others are down or on their way back; those on their way may be hurt again."""
    for seed in range(50):
        assert decide(seed, Roster(("a",))) is None
        assert decide(seed, Roster(("a",), faulty=("b",))) is None
        fault = decide(seed, Roster(("a",), recovering=("b",)))
        assert fault is not None
        assert fault.node == "b"
        assert decide(seed, Roster((), recovering=("a", "b", "c"))) is None


def test_a_cut_is_between_the_victim_and_others():
    """From some or all; both ways, or one way of calling for all of them."""
    cuts = [
        fault
        for seed in range(400)
        if (fault := decide(seed, Roster(("a", "b", "c", "d")))) and fault.kind == Kind.CUT
    ]
    ways = Counter()
    for fault in cuts:
        out = {called for caller, called in fault.pairs if caller == fault.node}
        back = {caller for caller, called in fault.pairs if called == fault.node}
        assert len(fault.pairs) == len(out) + len(back) == len(set(fault.pairs))
        assert out | back <= {"a", "b", "c", "d"} - {fault.node}
        assert out == back or not out or not back
        ways[bool(out), bool(back), len(out | back)] += 1
    assert len(ways) == 9  # three ways, one to three others
