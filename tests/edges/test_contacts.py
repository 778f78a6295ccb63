"""Greeting addresses again and again, in virtual time: when, for how long, and how many."""

import asyncio

import pytest
import structlog

from deca_node.config import Timing
from deca_node.errors import PeerUnavailable
from deca_node.limits import MAX_ANNOUNCED, MAX_CLAIMS, MAX_CONTACTS, MAX_PROPOSALS
from deca_node.swarm.contacts import (
    MAX_VAIN_GREETINGS,
    REFUSED_HEARTBEATS,
    Answer,
    Contacts,
    Origin,
)
from deca_node.swarm.refusals import Refusals
from tests.virtual_time import run

TIMING = Timing.lan()
JITTER = (0.75, 1.25)


class Link:
    """To nobody."""

    def __init__(self):
        self.closed = False

    async def close(self):
        self.closed = True


class Log:
    """Remembers lines."""

    def __init__(self):
        self.lines = []

    def warning(self, event, **values):
        self.lines.append((event, values))

    exception = warning


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
    contacts = Contacts(greeter, greeter, TIMING, 0, Log())
    contacts.add("10.0.0.1:7430", origin=Origin.OPERATOR, lasting=lasting)
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
        contacts = Contacts(greeter, greeter, TIMING, 0, Log())
        contacts.add("10.0.0.1:7430", origin=Origin.OPERATOR)
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
        # Over a new link: the old one may pause after a connection that was refused.
        assert greeter.left_links == greeter.made[:1]
        assert len(greeter.made) == 2
        assert [link.closed for link in greeter.made] == [True, False]
        contacts.found("10.0.0.1:7430")
        assert not contacts.never_answered(["10.0.0.1:7430"])
        assert not contacts.is_failing("10.0.0.1:7430")
        # Nor is a beat waited for, when somebody else answers there than the last time.
        contacts.welcome("10.0.0.1:7430")
        now = asyncio.get_running_loop().time()
        await asyncio.sleep(0.1)
        assert 0 <= greeter.times[-1] - now < 0.1
        assert len(greeter.made) == 2  # over a link that works
        await contacts.close()

    run(main())


def test_what_peers_name_takes_half_of_the_table_and_a_part_of_it_each():
    async def main():
        greeter = Greeter()
        contacts = Contacts(greeter, greeter, TIMING, 0, Log())
        for peer in range(MAX_CONTACTS):
            before = len(contacts)
            for port in range(1, MAX_PROPOSALS + 2):
                address = f"10.{peer >> 8}.{peer & 255}.1:{port}"
                contacts.add(address, origin=Origin.PEER, by=f"p{peer}")
            assert len(contacts) - before <= MAX_PROPOSALS
        assert len(contacts) == MAX_CONTACTS // 2
        for number in range(MAX_CONTACTS):
            contacts.add(f"host{number}:1", origin=Origin.OPERATOR, lasting=True)
        assert len(contacts) == MAX_CONTACTS
        await contacts.close()

    run(main())


def test_a_caller_has_a_few_addresses_and_a_new_one_replaces_one_that_was_tried():
    """Whatever host it names each time, it takes nobody else's place."""

    async def main():
        greeter = Greeter()
        contacts = Contacts(greeter, greeter, TIMING, 0, Log())
        contacts.add("10.9.9.9:1", origin=Origin.CALLER, by="honest")
        for number in range(100):
            contacts.add(f"10.0.0.{number}:1", origin=Origin.CALLER, by="liar")
            assert len(contacts) <= 1 + MAX_CLAIMS
        assert set(contacts._table) == {"10.9.9.9:1", *(f"10.0.0.{n}:1" for n in range(MAX_CLAIMS))}
        await asyncio.sleep(0.1)  # all were tried
        for number in range(100, 100 + MAX_CLAIMS):
            contacts.add(f"10.0.0.{number}:1", origin=Origin.CALLER, by="liar")
        newest = {f"10.0.0.{100 + n}:1" for n in range(MAX_CLAIMS)}
        assert set(contacts._table) == {"10.9.9.9:1", *newest}
        await contacts.close()
        assert all(link.closed for link in greeter.made)

    run(main())


def test_a_peer_that_was_met_keeps_its_place():
    """Also where it does not answer for a while; a further address has to wait."""

    async def main():
        greeter = Greeter(Answer.MET, met=True)
        contacts = Contacts(greeter, greeter, TIMING, 0, Log())
        for number in range(MAX_CLAIMS):
            contacts.add(f"10.0.0.{number}:1", origin=Origin.CALLER, by="a")
        await asyncio.sleep(0.1)
        greeter.answer, greeter.unanswered = None, lambda *_: None
        await asyncio.sleep(10 * TIMING.heartbeat)
        contacts.add("10.0.0.99:1", origin=Origin.CALLER, by="a")
        assert "10.0.0.99:1" not in contacts._table
        assert len(contacts) == MAX_CLAIMS
        await contacts.close()

    run(main())


def test_announcements_crowd_out_nobody():
    """Those where nobody is met have a share; the newest are tried, and those that answer stay."""

    async def main():
        greeter = Greeter()
        greeter.unanswered = lambda *_: None
        contacts = Contacts(greeter, greeter, TIMING, 0, Log())
        for number in range(4 * MAX_CONTACTS):
            contacts.add(f"10.1.{number >> 8}.{number & 255}:1", origin=Origin.NETWORK)
        assert len(contacts) == MAX_ANNOUNCED
        await asyncio.sleep(0.1)
        greeter.answer = Answer.MET
        for number in range(MAX_ANNOUNCED):
            contacts.add(f"10.2.0.{number}:1", origin=Origin.NETWORK)
        assert set(contacts._table) == {f"10.2.0.{n}:1" for n in range(MAX_ANNOUNCED)}
        await asyncio.sleep(0.1)
        greeter.answer = None
        for number in range(4 * MAX_CONTACTS):
            contacts.add(f"10.3.{number >> 8}.{number & 255}:1", origin=Origin.NETWORK)
        assert len(contacts) == 2 * MAX_ANNOUNCED
        for number in range(MAX_CONTACTS):
            contacts.add(f"10.4.{number >> 8}.{number & 255}:1", origin=Origin.PEER, by=f"{number}")
        for number in range(MAX_CONTACTS // 4):
            contacts.add(f"10.5.0.{number}:1", origin=Origin.OPERATOR)
        assert len(contacts) == MAX_CONTACTS
        await contacts.close()

    run(main())


def test_in_a_full_table_a_caller_takes_the_place_of_one_where_no_peer_was_met():
    """And who is to stay; of an address that is still tried not yet. It is said."""

    async def main():
        greeter, log = Greeter(), Log()
        greeter.unanswered = lambda *_: None
        contacts = Contacts(greeter, greeter, TIMING, 0, log)
        contacts.add("named:1", origin=Origin.OPERATOR, lasting=True)
        for number in range(MAX_CONTACTS):
            contacts.add(f"10.1.{number >> 8}.{number & 255}:1", origin=Origin.OPERATOR)
        assert len(contacts) == MAX_CONTACTS
        assert not log.lines
        contacts.add("caller:1", origin=Origin.CALLER, by="a")
        assert "caller:1" not in contacts._table
        assert "ignoring a new one" in log.lines[-1][0]
        await asyncio.sleep(0.1)
        contacts.add("announced:1", origin=Origin.NETWORK)
        contacts.add("said:1", origin=Origin.PEER, by="a")
        assert len(log.lines) == 1
        contacts.add("caller:1", origin=Origin.CALLER, by="a")
        contacts.add("static:1", origin=Origin.OPERATOR, lasting=True)
        assert {"named:1", "caller:1", "static:1"} <= set(contacts._table)
        assert not {"announced:1", "said:1", "10.1.0.0:1", "10.1.0.1:1"} & set(contacts._table)
        assert len(contacts) == MAX_CONTACTS
        assert log.lines[1][1] == {"address": "caller:1", "by": "a", "instead_of": "10.1.0.0:1"}
        await contacts.close()
        assert all(link.closed for link in greeter.made)

    run(main())


def test_what_was_found_may_be_named_to_stay_later():
    async def main():
        greeter = Greeter()
        contacts = Contacts(greeter, greeter, TIMING, 0, Log())
        contacts.add("10.0.0.1:1", origin=Origin.NETWORK)
        contacts.add("10.0.0.1:1", origin=Origin.OPERATOR, lasting=True)
        await asyncio.sleep(1000)
        assert len(contacts) == 1
        await contacts.close()

    run(main())


def test_once_closed_nobody_is_greeted_any_more():
    async def main():
        greeter = Greeter()
        contacts = Contacts(greeter, greeter, TIMING, 0, Log())
        await contacts.close()
        contacts.add("10.0.0.1:1", origin=Origin.CALLER, by="a")
        assert len(contacts) == 0
        await asyncio.sleep(10)
        assert not greeter.made

    run(main())


@pytest.mark.parametrize("where", ["link", "greet"])
def test_a_defect_costs_no_address(where):
    """It is logged once, and the address greeted on; when it is over all is as usual."""

    async def main():
        greeter, log = Greeter(Answer.MET), Log()
        whole = getattr(greeter, where)

        def broken(*_):
            raise ArithmeticError("a defect")

        setattr(greeter, where, broken)
        contacts = Contacts(greeter, greeter, TIMING, 0, log)
        contacts.add("10.0.0.1:7430", origin=Origin.OPERATOR, lasting=True)
        await asyncio.sleep(20)
        assert contacts.is_failing("10.0.0.1:7430")
        assert len(log.lines) == 1
        assert not greeter.times
        setattr(greeter, where, whole)
        await asyncio.sleep(20)
        assert not contacts.is_failing("10.0.0.1:7430")
        assert len(greeter.times) > 5
        await contacts.close()
        assert all(link.closed for link in greeter.made)

    run(main())


def test_a_refusal_that_comes_back_is_said_again():
    """A certificate that ends a second time is news; one that goes on being over is not."""
    with structlog.testing.capture_logs() as logged:
        refusals = Refusals(structlog.get_logger())
        for now in (0.0, 1.0):
            refusals.note("10.0.0.1:1", "bob", "expired", "its certificate expired", now)
        refusals.forget("10.0.0.1:1")
        refusals.note("10.0.0.1:1", "bob", "expired", "its certificate expired", 2.0)
    assert [line["reason"] for line in logged] == ["expired", "expired"]
