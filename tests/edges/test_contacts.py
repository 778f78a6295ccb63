"""Greeting addresses again and again, in virtual time: when, for how long, and how many."""

import asyncio

import pytest

from deca_node.config import Timing
from deca_node.errors import PeerUnavailable
from deca_node.limits import MAX_CONTACTS, MAX_PROPOSALS
from deca_node.swarm.contacts import (
    MAX_VAIN_GREETINGS,
    REFUSED_HEARTBEATS,
    Answer,
    Contacts,
)
from tests.virtual_time import run

TIMING = Timing.lan()
JITTER = (0.75, 1.25)


class Link:
    """To nobody."""

    def __init__(self):
        self.closed = False

    async def close(self):
        self.closed = True


class Greeter:
    """Gives the same answer always; without one nobody is there."""

    def __init__(self, answer=None, *, met=False):
        self.answer, self.met = answer, met
        self.times, self.left_links, self.made = [], [], []

    def link(self, address):  # the transport
        self.made.append(Link())
        return self.made[-1]

    async def greet(self, address, link):
        self.times.append(asyncio.get_running_loop().time())
        if self.answer is None:
            raise PeerUnavailable("nobody")
        return self.answer

    def unanswered(self, address, failures, error):
        assert failures == len(self.times)

    def was_met(self, address):
        return self.met

    def dropped(self, link):
        self.left_links.append(link)

    @property
    def pauses(self):
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


async def watched(greeter, seconds, *, lasting=False):
    """Greet one address for a while; how many are still greeted then."""
    contacts = Contacts(greeter, greeter, TIMING, 0)
    contacts.add("10.0.0.1:7430", lasting=lasting, by="")
    await asyncio.sleep(seconds)
    left = len(contacts)
    await contacts.close()
    assert greeter.left_links == greeter.made
    assert all(link.closed for link in greeter.made)
    return left


def within(pause, usual):
    return JITTER[0] * usual - 1e-3 <= pause <= JITTER[1] * usual + 1e-3


def test_pauses_double_up_to_a_bound_and_then_it_is_dropped():
    greeter = Greeter()
    assert run(watched(greeter, 1000)) == 0
    assert len(greeter.times) == MAX_VAIN_GREETINGS
    for failures, pause in enumerate(greeter.pauses):
        assert within(pause, min(TIMING.redial * 2**failures, TIMING.redial_max))
    assert len(set(greeter.pauses)) > MAX_VAIN_GREETINGS // 2  # not all alike


@pytest.mark.parametrize(("lasting", "met"), [(True, False), (False, True)])
def test_who_was_named_or_met_is_called_for_ever(lasting, met):
    greeter = Greeter(met=met)
    assert run(watched(greeter, 1000, lasting=lasting)) == 1
    assert len(greeter.times) > 2 * MAX_VAIN_GREETINGS


@pytest.mark.parametrize(("answer", "beats"), [("MET", 1), ("REFUSED", REFUSED_HEARTBEATS)])
def test_answers_are_followed_by_heartbeats(answer, beats):
    greeter = Greeter(Answer[answer])
    assert run(watched(greeter, 100)) == 1
    assert all(within(pause, beats * TIMING.heartbeat) for pause in greeter.pauses)


def test_this_node_itself_is_greeted_once():
    greeter = Greeter(Answer.ITSELF)
    assert run(watched(greeter, 100, lasting=True)) == 0
    assert len(greeter.times) == 1


def test_another_address_of_a_peer_is_kept_only_where_it_was_named():
    assert run(watched(Greeter(Answer.DUPLICATE), 100)) == 0
    greeter = Greeter(Answer.DUPLICATE)
    assert run(watched(greeter, 100, lasting=True)) == 1
    assert all(within(pause, REFUSED_HEARTBEATS * TIMING.heartbeat) for pause in greeter.pauses)


def test_a_caller_from_a_failing_address_is_called_back_at_once():
    async def main():
        greeter = Greeter(met=True)
        contacts = Contacts(greeter, greeter, TIMING, 0)
        contacts.add("10.0.0.1:7430", lasting=False, by="")
        await asyncio.sleep(100)
        assert contacts.is_unreached("10.0.0.1:7430")
        assert contacts.never_answered(["10.0.0.1:7430", "10.0.0.2:7430"]) == {"10.0.0.1:7430"}
        # Just after a greeting, so that the next one is far.
        count = len(greeter.times)
        while len(greeter.times) == count:
            await asyncio.sleep(0.01)
        now, greeter.answer = asyncio.get_running_loop().time(), Answer.MET
        contacts.welcome("10.0.0.1:7430")
        assert not contacts.is_unreached("10.0.0.1:7430")  # before, there was nobody to answer
        await asyncio.sleep(0.1)
        assert greeter.times[-1] - now < 0.1
        contacts.found("10.0.0.1:7430")
        assert not contacts.never_answered(["10.0.0.1:7430"])
        assert not contacts.is_failing("10.0.0.1:7430")
        await contacts.close()

    run(main())


def test_what_peers_name_takes_half_of_the_table_and_a_part_of_it_each():
    async def main():
        greeter = Greeter()
        contacts = Contacts(greeter, greeter, TIMING, 0)
        for peer in range(MAX_CONTACTS):
            before = len(contacts)
            for port in range(1, MAX_PROPOSALS + 2):
                contacts.add(f"10.{peer >> 8}.{peer & 255}.1:{port}", lasting=False, by=f"p{peer}")
            assert len(contacts) - before <= MAX_PROPOSALS
        assert len(contacts) == MAX_CONTACTS // 2
        for number in range(MAX_CONTACTS):
            contacts.add(f"host{number}:1", lasting=True, by="")
        assert len(contacts) == MAX_CONTACTS
        await contacts.close()

    run(main())
