"""Membership decisions: tables of events and what they lead to."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deca_node.compression import Format
from deca_node.limits import MAX_MEMBERS
from deca_node.membership import (
    Peer,
    Phase,
    State,
    Verdict,
    VisitAgreement,
    came_to,
    departed,
    failed,
    heard,
    may_come,
    members,
    near_visits,
    overhauled,
    ready,
)

BOB = Peer("bob", 7, "10.0.0.2:7430", State.ALIVE, Phase.TRAINING, 3, last_seen=100.0)


def greet(
    known,
    *,
    session=7,
    phase=Phase.TRAINING,
    visit=3,
    own_visit=3,
    near=1,
    entry=0,
    reached=True,
):
    return heard(
        known,
        name="bob",
        session=session,
        address="10.0.0.2:7430",
        phase=phase,
        visit=visit,
        own_visit=own_visit,
        near=near,
        now=101.0,
        entry=entry,
        reached=reached,
    )


@pytest.mark.parametrize(
    ("known", "event", "state"),
    [
        (None, {}, State.ALIVE),
        (None, {"visit": 9}, State.AHEAD),
        (None, {"visit": 4}, State.ALIVE),  # next door is near enough
        (None, {"visit": 9, "near": 6}, State.ALIVE),  # as it is in a long ring with short visits
        (BOB, {"visit": 9}, State.AHEAD),  # went on behind a cut
        (BOB, {"visit": 0, "session": 8}, State.BEHIND),  # restarted from nothing
        (BOB, {"visit": 0}, State.BEHIND),  # slept
        (BOB, {"visit": 0, "phase": Phase.CATCHING_UP}, State.ALIVE),
        (replace(BOB, state=State.AHEAD), {"visit": 4}, State.ALIVE),
        (replace(BOB, state=State.GONE), {}, State.ALIVE),
        (replace(BOB, state=State.BEHIND), {"visit": 0}, State.BEHIND),
        (replace(BOB, state=State.BEHIND), {"visit": 2}, State.ALIVE),  # caught up
        (BOB, {"phase": Phase.SERVING}, State.DONE),
        (BOB, {"phase": Phase.AGREEING, "visit": 4}, State.ALIVE),
        (BOB, {"phase": Phase.STOPPING}, State.GONE),
        (departed(BOB, 100.5, finished=False), {}, State.GONE),  # overtaken by its goodbye
        (departed(BOB, 100.5, finished=False), {"session": 8}, State.ALIVE),  # started again
    ],
)
def test_a_greeting_decides_the_state(known, event, state):
    """What a greeting means depends on what was known and on both places in the schedule."""
    assert greet(known, **event).state == state


def test_who_was_reached_is_so_until_it_starts_again():
    """A caller may be behind a router that lets no call in; that is known of each session."""
    assert not greet(None, reached=False).reached
    assert greet(BOB, reached=False).reached
    assert not greet(BOB, session=8, reached=False).reached


AHEAD = replace(BOB, state=State.AHEAD, visit=9, detail="at visit 9, we are at 3")


@pytest.mark.parametrize(
    ("peer", "own_visit", "state"),
    [
        (AHEAD, 7, State.AHEAD),
        (AHEAD, 8, State.ALIVE),
        (AHEAD, 10, State.ALIVE),
        (AHEAD, 12, State.BEHIND),
        (BOB, 5, State.ALIVE),  # it moves on about when we do, and is heard later
        (replace(BOB, state=State.SUSPECT), 3, State.SUSPECT),
        (replace(BOB, state=State.BEHIND), 3, State.BEHIND),
        (replace(BOB, state=State.GONE), 3, State.GONE),
    ],
)
def test_who_has_caught_up_is_in_step_with_those_that_were_ahead(peer, own_visit, state):
    """At once, not when they are heard next: the visit about to begin needs its neighbours."""
    after = overhauled(peer, own_visit, near=1)
    assert after.state == state
    assert after.visit == peer.visit
    if state == State.ALIVE:
        assert after.detail == ""


@pytest.mark.parametrize(
    ("silence", "failures", "state"),
    [(1, 1, State.SUSPECT), (1, 2, State.SUSPECT), (1, 3, State.GONE), (31, 0, State.GONE)],
)
def test_failures_lead_over_suspicion_to_gone(silence, failures, state):
    """One or two vain greetings make a suspect; three, or long silence, count as gone."""
    assert failed(BOB, 100.0 + silence, 30.0, failures, "refused").state == state


def test_whose_connection_broke_stays_down_while_it_is_silent():
    """Until it is heard; what a later greeting fails of says nothing of that."""
    broken = failed(BOB, 101.0, 30.0, 1, "connection reset", down=True)
    assert broken.down
    assert failed(broken, 102.0, 30.0, 2, "late").down
    assert not failed(BOB, 102.0, 30.0, 2, "late").down
    assert not greet(broken).down


def test_who_is_done_stays_done():
    """The end of a finished peer's process is no failure."""
    done = departed(BOB, 101.0, finished=True)
    assert done.state == State.DONE
    assert failed(done, 999.0, 30.0, 9, "refused") is done


@pytest.mark.parametrize(
    ("silence", "failures", "state"),
    [(1, 2, State.DONE), (29, 0, State.DONE), (1, 3, State.GONE), (30, 0, State.GONE)],
)
def test_who_dies_while_it_serves_is_gone(silence, failures, state):
    """Without a goodbye nobody knows that it serves no more, and would ask it before each visit."""
    serving = greet(BOB, phase=Phase.SERVING)
    assert serving.state == State.DONE
    after = failed(serving, serving.last_seen + silence, 30.0, failures, "refused")
    assert after.state == state
    assert greet(after, phase=Phase.SERVING).state == State.DONE  # it was only cut off


def test_members_are_those_that_act():
    """Starting, gone, far and finished peers are in nobody's topology."""
    peers = [
        BOB,
        replace(BOB, name="sue", state=State.SUSPECT),
        replace(BOB, name="new", phase=Phase.STARTING),
        replace(BOB, name="ann", phase=Phase.AGREEING),
        replace(BOB, name="out", state=State.GONE),
        replace(BOB, name="far", state=State.BEHIND),
        replace(BOB, name="off", state=State.AHEAD),
        replace(BOB, name="end", state=State.DONE),
        replace(BOB, name="deaf", reached=False),
    ]
    assert members("me", peers, 3) == {"me", "bob", "sue", "ann"}


def test_who_catches_up_is_a_member_from_the_visit_it_has_named():
    """Nobody waits for it before, and everybody counts it from there on."""
    joiner = replace(BOB, phase=Phase.CATCHING_UP)
    for entry, visit, present in ((0, 5, False), (6, 5, False), (6, 6, True), (6, 7, True)):
        found = members("me", [replace(joiner, entry=entry)], visit)
        assert (found == {"me", "bob"}) is present


@pytest.mark.parametrize(
    ("count", "steps", "visits"),
    [(1, 1, 1), (2, 48, 1), (8, 48, 1), (8, 1, 7), (8, 2, 4), (9, 4, 2), (256, 6, 43)],
)
def test_members_in_step_are_near(count, steps, visits):
    """The longest chain of neighbours bounds how far its two ends can be apart."""
    assert near_visits(count, steps) == visits


def test_waiting_names_who_is_here_and_who_does_not_count():
    """The line a waiting node logs says what an operator needs to know."""
    refused = replace(BOB, name="eve", state=State.REFUSED, detail="run.seed is '1' here")
    enough, text = ready("me", [BOB, refused], 4)
    assert not enough
    assert text == (
        "2 of 4 members missing; here: bob, me; not counted: eve refused: run.seed is '1' here"
    )
    assert ready("me", [BOB], 2) == (True, "2 of 2 members: bob, me")


class Net:
    """Two agreements whose messages are delivered in an order that hypothesis chooses."""

    def __init__(self):
        self.sides = {"a": VisitAgreement(5), "b": VisitAgreement(5)}
        for me, other in (("a", "b"), ("b", "a")):
            self.sides[me].begin(5, frozenset({other}))


@given(st.permutations(["offer a", "offer b", "close a", "close b"]))
def test_an_edge_is_used_by_both_ends_or_by_neither(order):
    """Whenever the two ends close, before or after the offers, they agree on the edge."""
    net = Net()
    edges = {}
    for event, me in (step.split() for step in order):
        other = "b" if me == "a" else "a"
        if event == "offer":
            if not net.sides[me].closed:
                verdict = net.sides[other].offered(me, 5, 1)
                net.sides[me].answered(other, verdict)
        else:
            edges[me] = net.sides[me].close()
    assert bool(edges["a"]) == bool(edges["b"])


def test_offers_ahead_of_time_are_kept_for_the_visit():
    """A neighbour that is one visit ahead need not ask again."""
    desk = VisitAgreement(0)
    desk.begin(0, frozenset({"b"}))
    assert desk.offered("b", 1, 1) is Verdict.ACCEPTED
    desk.answered("b", Verdict.ACCEPTED)  # before it closed this visit without us
    assert desk.close() == frozenset()
    desk.begin(1, frozenset({"b"}))
    desk.answered("b", Verdict.ACCEPTED)
    assert not desk.undecided()
    assert desk.close() == {"b"}


def test_a_restarted_neighbour_gets_no_edge_in_a_closed_visit():
    """A repeated offer of the same session is confirmed, one of a new session is too late."""
    desk = VisitAgreement(2)
    desk.begin(2, frozenset({"b"}))
    desk.offered("b", 2, 1)
    desk.answered("b", Verdict.ACCEPTED)
    desk.close()
    assert desk.offered("b", 2, 1) is Verdict.ACCEPTED
    assert desk.offered("b", 2, 9) is Verdict.PASSED
    assert desk.offered("c", 2, 1) is Verdict.PASSED
    assert desk.offered("b", 1, 1) is Verdict.PASSED


def test_an_edge_without_its_degree_carries_nothing():
    """A neighbour that vanished between offer and degree leaves its weight with the node."""
    desk = VisitAgreement(0)
    desk.begin(0, frozenset("bc"))
    for peer in "bc":
        desk.offered(peer, 0, 1)
        desk.answered(peer, Verdict.ACCEPTED)
    desk.close()
    desk.degree("b", 0, 1)
    desk.degree("c", 7, 2)  # of another visit
    edges = desk.settle()
    assert edges.weights == {"b": pytest.approx(1 / 3)}  # as b takes it, which was told 2
    assert edges.own_weight == pytest.approx(2 / 3)
    assert edges.degree == 2


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 9)), max_size=40))
def test_what_was_told_of_visits_that_are_over_is_forgotten(told):
    """Of each peer the latest word counts, and is kept for as long as its visit is to come."""
    agreement = VisitAgreement(0)
    latest = {}
    for peer, visit in told:
        agreement.offered(peer, visit, 1)
        agreement.degree(peer, visit, 2)
        latest[peer] = visit
    agreement.begin(5, frozenset("ab"))
    assert agreement.known == {peer for peer, visit in latest.items() if visit >= 5}


@pytest.mark.parametrize("told", ["offer", "degree", "both"])
def test_names_that_come_and_go_fill_no_table(told):
    """Each is new, offers a visit far ahead and leaves; the neighbours' words stay.

    So do those of a neighbour that counts as gone for a moment.
    """
    agreement = VisitAgreement(3)
    agreement.begin(3, frozenset("bc"))
    agreement.offered("b", 3, 1)
    agreement.answered("b", Verdict.ACCEPTED)
    agreement.close()
    agreement.degree("b", 3, 2)
    agreement.offered("d", 4, 1)  # a neighbour's of the next visit, told early
    for index in range(3 * MAX_MEMBERS):
        name = f"eve{index}"
        agreement.make_room(lambda peer, here=name: peer not in ("d", here))
        if told != "degree":
            assert agreement.offered(name, 10**9 + index, 1) is Verdict.ACCEPTED
        if told != "offer":
            agreement.degree(name, 10**9 + index, 1)
        assert len(agreement.known) <= MAX_MEMBERS + 1
    assert {"b", "d"} <= agreement.known
    assert agreement.settle().weights == {"b": pytest.approx(1 / 3)}


def test_graphs_are_told_with_the_degree():
    """What the other end sees is known once its degree is, for this visit alone."""
    agreement = VisitAgreement(0)
    for visit, graph in ((0, 77), (1, 0)):
        agreement.begin(visit, frozenset({"bob"}))
        agreement.offered("bob", visit, 7)
        agreement.answered("bob", Verdict.ACCEPTED)
        agreement.close()
        agreement.degree("bob", visit, 1, graph)
        assert agreement.settle().graphs == {"bob": graph}


def test_who_resumes_elsewhere_in_a_visit_gets_no_edge():
    """Steps far apart are no edge on either end; the one behind knows that it was overtaken."""
    for apart, edge in ((0, True), (1, True), (2, False), (40, False)):
        sides = {"a": VisitAgreement(5), "b": VisitAgreement(5)}
        sides["a"].begin(5, frozenset("b"), 3)
        sides["b"].begin(5, frozenset("a"), 3 + apart)
        sides["a"].answered("b", sides["b"].offered("a", 5, 1, 3))
        sides["b"].answered("a", sides["a"].offered("b", 5, 2, 3 + apart))
        for side in sides.values():
            assert bool(side.close()) is edge
        assert sides["a"].overtaken is not edge
        assert not sides["b"].overtaken


@pytest.mark.parametrize(
    ("verdict", "linked", "overtaken"),
    [
        (Verdict.PASSED, False, True),
        (Verdict.PASSED, True, False),  # the visit is worth doing with the other one
        (Verdict.NOT_WANTED, False, False),  # it sees other members, wherever it is
    ],
)
def test_a_visit_without_an_edge_was_overtaken_where_a_neighbour_says_so(
    verdict, linked, overtaken
):
    agreement = VisitAgreement(5)
    agreement.begin(5, frozenset("bc"))
    agreement.offered("b", 5, 1, step=40)
    agreement.answered("b", verdict)
    if linked:
        agreement.offered("c", 5, 1)
        agreement.answered("c", Verdict.ACCEPTED)
    assert agreement.close() == (frozenset("c") if linked else frozenset())
    assert agreement.overtaken is overtaken


def test_an_edges_format_comes_from_both_ends_offers_for_its_visit():
    """Wishes of another visit, told early, do not count; fp32 goes without saying."""
    agreement = VisitAgreement(0)
    agreement.begin(3, frozenset("abc"), wish=Format.BF16)
    for peer, wish in (("a", Format.FP32), ("b", Format.INT8), ("c", Format.BF16)):
        assert agreement.offered(peer, 3, 1, wish=wish) is Verdict.ACCEPTED
        agreement.answered(peer, Verdict.ACCEPTED)
    agreement.close()
    agreement.offered("a", 4, 1, wish=Format.INT8)
    for peer in "abc":
        agreement.degree(peer, 3, 1)
    edges = agreement.settle()
    assert edges.formats == {"a": Format.BF16, "b": Format.INT8, "c": Format.BF16}
    agreement.begin(4, frozenset("a"))
    agreement.offered("a", 4, 1)
    agreement.answered("a", Verdict.ACCEPTED)
    agreement.close()
    agreement.degree("a", 4, 1)
    assert agreement.settle().format("a") is Format.FP32
    assert agreement.settle().formats == {}


@pytest.mark.parametrize(
    ("peer", "missed"),
    [
        (BOB, True),
        (replace(BOB, state=State.BEHIND, visit=0), True),  # came back in the agreement
        (replace(BOB, state=State.GONE, visit=8), True),  # killed in the last round
        (departed(replace(BOB, visit=9), 101.0, finished=False), True),  # stopped in it
        (replace(BOB, state=State.GONE), False),  # left for good in the middle
        (replace(BOB, state=State.DONE, visit=12), True),
        (replace(BOB, state=State.REFUSED, visit=9), False),
        (replace(BOB, reached=False), False),
    ],
)
def test_at_the_end_only_those_are_missed_that_came_to_the_last_round(peer, missed):
    assert came_to([peer], 8) == ({"bob"} if missed else set())


@pytest.mark.parametrize(
    ("state", "phase", "reached", "comes"),
    [
        (State.GONE, Phase.TRAINING, True, True),
        (State.BEHIND, Phase.TRAINING, True, True),
        (State.ALIVE, Phase.WAITING, True, True),
        (State.ALIVE, Phase.CATCHING_UP, True, True),
        (State.ALIVE, Phase.TRAINING, True, False),  # in step, it ends by itself
        (State.ALIVE, Phase.AGREEING, True, False),
        (State.DONE, Phase.SERVING, True, False),
        (State.DONE, Phase.DONE, True, False),
        (State.REFUSED, Phase.WAITING, True, False),
        (State.GONE, Phase.TRAINING, False, False),
    ],
)
def test_whoever_is_away_or_on_its_way_back_may_come_for_blocks(state, phase, reached, comes):
    """For it a node that has ended stays a moment; where there is nobody like that it does not."""
    peer = Peer("bob", 1, "b:1", state, phase, 3, 0.0, reached=reached)
    assert may_come([peer]) == comes
