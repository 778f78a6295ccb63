"""What a node warns of: tables of what it knows and what it then says."""

from dataclasses import replace

import pytest

from deca_node.health import LATE_STEPS, MAX_TOLD, Refusal, Told, View, diagnose, late_steps
from deca_node.membership import Peer, Phase, State

BOB = Peer("bob", 7, "10.0.0.2:7430", State.ALIVE, Phase.TRAINING, 3, last_seen=99.0)
EVE = replace(BOB, name="eve", address="10.0.0.5:7430")
GONE = replace(BOB, state=State.GONE, detail="silent for 40 s: no answer", last_seen=50.0)
WELL = View(
    name="ann",
    run="bbc",
    port=7430,
    phase=Phase.TRAINING,
    wanted=2,
    now=100.0,
    looking=60.0,
    peers=[BOB],
    told={"bob": Told("1.0", 0.1)},
    version="1.0",
    neighbours=frozenset({"bob"}),
    most=2,
    zeroconf=True,
    heard_itself=True,
)


def view(**changes):
    return replace(WELL, **changes)


def refused(reason, at=99.0, address="10.0.0.9:7430"):
    return {address: Refusal("max", reason, "words of the refusal", at)}


def test_a_healthy_node_says_nothing():
    """Nor does one whose run is over, whatever else is wrong."""
    assert diagnose(WELL) == []
    bad = view(neighbours=frozenset(), peers=[], heard_itself=False)
    assert diagnose(bad)
    for phase in (Phase.SERVING, Phase.DONE, Phase.STOPPING):
        assert diagnose(replace(bad, phase=phase)) == []


WAITING = {"phase": Phase.WAITING, "neighbours": None}


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        # no neighbour
        ({"neighbours": frozenset()}, "alone", "bob alive"),
        ({**WAITING, "peers": []}, "alone", "run 'bbc'"),
        # a swarm in two parts
        ({"peers": [BOB, replace(GONE, name="cat")]}, None, ""),  # as many as ever were are here
        ({"peers": [BOB, replace(GONE, name="cat")], "most": 3}, "parted", "cat vanished, 2 of 3"),
        (
            {
                "peers": [BOB, replace(GONE, name="cat"), replace(GONE, name="dan", last_seen=60)],
                "wanted": 4,
            },
            "parted",
            "cat, dan vanished together: the swarm seems cut in two",
        ),
        (
            {
                "peers": [BOB, replace(GONE, name="cat"), replace(GONE, name="dan", last_seen=0)],
                "wanted": 4,
            },
            "parted",
            "cat, dan vanished, 2 of 4 members are here",  # one after the other
        ),
        (
            {
                "peers": [
                    BOB,
                    replace(GONE, name="cat"),
                    replace(GONE, name="dan", phase=Phase.STOPPING),
                ],
                "wanted": 4,
            },
            "parted",
            "cat vanished, 2 of 4 members are here",  # the other one has left
        ),
        ({"wanted": 4}, "parted", "2 of 4 members are here while we train"),
        ({"wanted": 1, "most": 3}, None, ""),
        ({"wanted": 4, **WAITING}, None, ""),  # the others have yet to come
        ({"most": 3, "peers": [BOB, replace(GONE, name="cat", phase=Phase.STOPPING)]}, None, ""),
        ({"most": 3, "peers": [BOB, replace(EVE, state=State.DONE)]}, None, ""),
        ({"most": 3, "peers": [BOB, replace(EVE, state=State.BEHIND)]}, None, ""),
        # refusals
        (
            {"peers": [BOB, replace(EVE, state=State.REFUSED, detail="run.seed is '1' here")]},
            "refused:eve",
            "run.seed is '1' here",
        ),
        ({"peers": [BOB, replace(EVE, state=State.REFUSED, last_seen=-50.0)]}, None, ""),
        ({"refusals": refused("name_taken")}, "refused:10.0.0.9:7430", "node.name"),
        ({"refusals": refused("protocol")}, "refused:10.0.0.9:7430", "same version"),
        ({"refusals": refused("protocol", at=-30.0)}, None, ""),
        ({"refusals": refused("bad_name")}, "refused:10.0.0.9:7430", "see both nodes' logs"),
        (
            {"refusals": {"10.0.0.9:7430": Refusal("max", "full", "", 99.0)}},
            "refused:10.0.0.9:7430",
            "refuse each other: full; ",
        ),
        ({"refusals": refused("other_run")}, None, ""),  # normal, unless we were told to call it
        (
            {"refusals": refused("other_run"), "static": ["10.0.0.9:7430"]},
            "refused:10.0.0.9:7430",
            "network.static_peers",
        ),
        # reachability
        ({"told": {"bob": Told(unreached=True)}}, "unreachable", "open port 7430/tcp"),
        ({"told": {"bob": Told(unreached=True)}}, "unreachable", "node.advertise"),
        ({"uncallable": frozenset({"bob"})}, "uncallable:bob", "10.0.0.2:7430"),
        ({"uncallable": frozenset({"bob"}), "peers": [replace(BOB, state=State.DONE)]}, None, ""),
        (
            {"static": ["h:1", "h:2"], "silent": frozenset({"h:2"})},
            "silent:h:2",
            "static peer h:2 has never answered",
        ),
        ({"static": ["h:2"], "silent": frozenset({"h:2"}), "looking": 14.0}, None, ""),
        (
            {"unresolved": {"swarm:7430": "Name or service not known"}},
            "unresolved:swarm:7430",
            "swarm:7430 has no address (Name or service not known); correct network.dns_peers",
        ),
        # a slow neighbour
        ({"late": {"bob": LATE_STEPS}}, "late:bob", "bob's blocks come too late, 5 steps in a row"),
        ({"late": {"bob": LATE_STEPS}}, "late:bob", "lower data.batch_size there"),
        ({"late": {"bob": LATE_STEPS - 1}}, None, ""),
        ({"late": {"eve": 99}, "peers": [BOB, EVE]}, None, ""),  # in no graph of ours now
        ({"late": {"bob": 99}, "phase": Phase.PAUSED}, None, ""),
        ({"late": {"bob": 99}, "peers": [replace(BOB, phase=Phase.PAUSED)]}, None, ""),
        ({"late": {"bob": 99}, "peers": [replace(BOB, state=State.SUSPECT)]}, None, ""),
        # multicast
        ({"heard_itself": False}, "multicast", "network.interfaces"),
        ({"heard_itself": False, "heard_others": True}, None, ""),
        ({"heard_itself": False, "zeroconf": False}, None, ""),
        ({"heard_itself": False, "looking": 14.0}, None, ""),
        # clocks and versions
        ({"told": {"bob": Told(clock=29.0)}}, None, ""),
        ({"told": {"bob": Told(clock=95.0)}}, "clock:bob", "bob is 95 s ahead of ours"),
        ({"told": {"bob": Told(clock=-7200.0)}}, "clock:bob", "bob is 2 h behind ours"),
        (
            {"told": {"bob": Told(clock=95.0), "eve": Told(clock=90.0)}, "peers": [BOB, EVE]},
            "clock",
            "this machine is at least 90 s behind that of all 2 peers",
        ),
        (
            {"told": {"bob": Told(clock=-95.0), "eve": Told(clock=-90.0)}, "peers": [BOB, EVE]},
            "clock",
            "this machine is at least 90 s ahead of that of all 2 peers",
        ),
        (
            {"told": {"bob": Told(clock=95.0), "eve": Told(clock=0.0)}, "peers": [BOB, EVE]},
            "clock:bob",
            "NTP",
        ),
        ({"told": {"bob": Told("1.1")}}, "version:bob", "runs deca-node 1.1, this is 1.0"),
        (
            {  # whatever the gone have said
                "told": {"eve": Told("1.1", 95.0, unreached=True)},
                "uncallable": frozenset({"eve"}),
                "peers": [BOB, replace(EVE, state=State.GONE)],
            },
            None,
            "",
        ),
    ],
)
def test_each_trouble_has_its_line(changes, key, words):
    """The condition is told once, with its remedy, and nothing else is."""
    found = diagnose(view(**changes))
    if key is None:
        assert found == []
        return
    assert [finding.key for finding in found] == [key]
    assert words in found[0].text
    assert "\n" not in found[0].text


@pytest.mark.parametrize(
    "changes",
    [
        {"wanted": 1},  # meant to be alone
        {"isolated": True},
        {"neighbours": None},  # the first visit has not begun
        {"peers": [replace(BOB, state=State.DONE)]},  # we are the last one to finish
    ],
)
def test_alone_for_a_good_reason_is_no_trouble(changes):
    """Nobody is told to mend what is as it was meant."""
    found = diagnose(view(**{"neighbours": frozenset(), **changes}))
    assert found == []


def test_waiting_alone_is_said_after_a_while():
    """The others may be starting, too."""
    assert diagnose(view(**WAITING, peers=[], looking=3.0)) == []
    for zeroconf in (True, False):
        (found,) = diagnose(view(**WAITING, peers=[], looking=16.0, zeroconf=zeroconf))
        assert found.key == "alone"
        assert ("multicast may be blocked" in found.text) == zeroconf


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"refusals": refused("name_taken")}, ["refused:10.0.0.9:7430"]),
        ({"peers": [replace(EVE, state=State.REFUSED, detail="x")]}, ["refused:eve"]),
        ({"refusals": refused("name_taken", at=-30.0)}, ["alone"]),  # it is no longer there
        ({"peers": [replace(EVE, state=State.REFUSED, last_seen=-50.0)]}, ["alone"]),
        ({"refusals": refused("other_run")}, ["alone"]),
    ],
)
def test_who_is_refused_by_a_node_of_the_run_is_not_told_that_nobody_answers(changes, keys):
    """The network is not to be blamed for what the refusal says."""
    found = diagnose(view(**{**WAITING, "peers": [], **changes}))
    assert [finding.key for finding in found] == keys


def test_strangers_cannot_fill_the_warnings():
    """Some are named and the rest counted; what they say stays one line of bounded length."""
    crowd = [
        replace(BOB, name=f"x{i}", state=State.REFUSED, detail="\x1b[2J\n" + "y" * 999)
        for i in range(200)
    ]
    found = diagnose(view(peers=[BOB, *crowd]))
    assert len(found) == MAX_TOLD + 1
    assert found[-1].text.startswith("195 more")
    assert all(f.text.isprintable() and len(f.text) < 500 for f in found)
    found = diagnose(view(peers=[BOB, *crowd[:MAX_TOLD]]))
    assert len(found) == MAX_TOLD  # none more


def test_of_many_that_vanished_some_are_named():
    """And the rest counted, where there is one."""
    lost = [replace(GONE, name=f"x{i}") for i in range(MAX_TOLD + 1)]
    for count, rest in ((MAX_TOLD, "x4 vanished"), (MAX_TOLD + 1, "x4 and 1 more vanished")):
        (found,) = diagnose(view(peers=[BOB, *lost[:count]], wanted=9))
        assert rest in found.text


def test_late_steps_are_counted_in_a_row():
    """A block in time ends the count; who was not asked for one keeps it."""
    counts = late_steps({}, ["bob", "eve"], ["max"])
    counts = late_steps(counts, ["bob"], [])
    assert counts == {"bob": 2, "eve": 1}
    assert late_steps(counts, ["eve"], ["bob"]) == {"eve": 2}


def test_clocks_that_differ_from_ours_both_ways_are_not_ours_to_set():
    """As they do not agree with each other either."""
    told = {"bob": Told(clock=95.0), "eve": Told(clock=-95.0)}
    found = diagnose(view(told=told, peers=[BOB, EVE]))
    assert [finding.key for finding in found] == ["clock:bob", "clock:eve"]
    assert ["ahead of ours" in f.text for f in found] == [True, False]


def test_a_finding_keeps_its_key_while_its_text_changes():
    """So that it is logged once."""
    keys = {
        finding.key
        for clock in (95.0, 96.0, 99.5)
        for finding in diagnose(view(told={"bob": Told("1.0", clock)}))
    }
    assert keys == {"clock:bob"}


def test_a_node_that_lost_everybody_is_told_both():
    """That it trains alone, and who is missing."""
    found = diagnose(view(peers=[GONE], neighbours=frozenset()))
    assert [finding.key for finding in found] == ["alone", "parted"]
    assert "nobody answers any more" in found[0].text
    assert "bob vanished, 1 of 2 members" in found[1].text
