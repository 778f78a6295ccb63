"""Attacks over real sockets: none of them gets in."""

import asyncio
import contextlib
import json
import re
import socket
import ssl
import time
from collections import Counter
from contextlib import AsyncExitStack, aclosing, asynccontextmanager

import pytest

from deca_node import identity, pairing
from deca_node import keyring as keyring_module
from deca_node.access import credentials
from deca_node.admission import Turns
from deca_node.errors import PeerError, PeerRefused, TrustError, UnreachableError
from deca_node.guard import Guard, Visitor
from deca_node.identity import Authority
from deca_node.keyring import Keyring
from deca_node.limits import (
    KEPT_WATCHERS,
    MAX_JOIN_ATTEMPTS,
    MAX_JOINERS,
    MAX_JOINERS_PER_ADDRESS,
    MAX_WATCHERS_PER_CALLER,
)
from deca_node.pairing import Inviter, NobodyError, Terms, join
from deca_node.pb import node_pb2 as pb
from deca_node.transport.client import GrpcLink, ask_status
from deca_node.transport.server import GrpcTransport
from deca_node.trust import read_token, token
from tests.edges.test_transport import Answers
from tests.trust import Run

BACK = -10 * 86400


class Desk(Answers):
    """A handler that says who it is."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    async def hello(self, request, source):
        self.asked.append((request.sender.node, source))
        return pb.HelloReply(sender=pb.Sender(run="run", node=self.name, session=1), visit=7)


@asynccontextmanager
async def listening(guard, name="alice", says=None):
    """A node of a run; its handler, its address."""
    desk, transport = Desk(says or name), GrpcTransport("127.0.0.1", 0, guard)
    port = await transport.listen(desk, desk)
    try:
        yield desk, f"127.0.0.1:{port}"
    finally:
        desk.hold.set()
        await transport.close(0)


def greeting(node):
    return pb.HelloRequest(sender=pb.Sender(run="run", node=node, session=3))


async def refused(address, guard, node="eve", **shown):
    """Every call that a peer can make, as this caller; the reasons why each was refused."""
    link, sender = GrpcLink(address, guard, **shown), pb.Sender(run="run", node=node, session=3)
    reasons = []

    async def streamed(stream):
        async with aclosing(stream) as messages:
            async for _ in messages:
                pass

    link._node = "alice"  # the attacker does not wait until it has met the callee
    for call in (
        link.hello(pb.HelloRequest(sender=sender), 5),
        link.open_visit(pb.VisitOffer(sender=sender), 5),
        link.settle_visit(pb.VisitDegree(sender=sender), 5),
        link.list_blocks(pb.ListBlocksRequest(sender=sender), 5),
        link.goodbye(pb.GoodbyeRequest(sender=sender), 5),
        streamed(link.pull(pb.PullRequest(sender=sender, serial=3), 5)),
        streamed(link.fetch_block(pb.FetchBlockRequest(sender=sender), 5)),
    ):
        with pytest.raises(PeerError) as caught:
            await call
        reasons.append(caught.value.reason)
    await link.close()
    return set(reasons)


class Naive:
    """A guard without any scruples: the attacker's own."""

    def __init__(self, shown):
        self._shown = shown
        self.refused = Counter()

    def credentials(self):
        return self._shown

    def vouch(self, node):
        pass

    def digest(self):
        return 0

    def revocations(self):
        return pb.Revocations()

    def learn(self, told):
        pass


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "run")


def naive(run, node, **options):
    """Credentials of a member, used without its own checks."""
    pair = run.keyring(node, **options).node(node)
    from deca_node.transport.connection import Credentials

    return Naive(Credentials(pair.key, pair.certificate, run.authority.certificate, run.name))


async def test_members_talk(run):
    """All calls pass between two members, and each knows who the other is."""
    async with listening(run.guard("alice")) as (desk, address):
        link = GrpcLink(address, run.guard("bob"))
        sender = pb.Sender(run="run", node="bob", session=3)
        assert (await link.hello(greeting("bob"), 5)).visit == 7
        assert link._node == "alice"
        answer = await link.settle_visit(pb.VisitDegree(sender=sender, visit=4, degree=2), 5)
        assert answer.visit == 6
        request = pb.PullRequest(sender=sender, serial=3)
        async with aclosing(link.pull(request, 5)) as messages:
            assert len([message async for message in messages]) == 3
        await link.close()
        assert {node for node, _ in desk.asked} == {"bob"}


async def test_entry_in_plain_text(run):
    """Not even status."""
    async with listening(run.guard("alice")) as (desk, address):
        assert await refused(address, None) <= {"unavailable", "late"}
        with pytest.raises(PeerError):
            await ask_status(address, 3)
        assert not desk.asked


async def test_entry_without_a_certificate(run):
    """TLS alone is not enough."""
    context = ssl.create_default_context(cadata=run.authority.certificate.decode())
    context.check_hostname = False
    context.set_alpn_protocols(["h2"])

    def knock(address):
        host, port = address.split(":")
        with (
            socket.create_connection((host, int(port)), 5) as plain,
            context.wrap_socket(plain) as secure,
        ):
            secure.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9))
            return secure.recv(100)

    async with listening(run.guard("alice")) as (desk, address):
        try:
            answer = await asyncio.to_thread(knock, address)
        except OSError:  # ssl.SSLError is one
            answer = b""
        assert answer == b""
        assert not desk.asked


async def test_entry_with_a_certificate_of_another_run(run, tmp_path):
    """Of the same name, with the same node's name; the callee is not believed either."""
    other = Run(tmp_path / "other")
    async with listening(run.guard("alice")) as (desk, address):
        stranger = naive(other, "bob")
        assert await refused(address, stranger, "bob") <= {"unavailable", "handshake"}
        mixed = naive(other, "bob")  # believes in our authority, shows its own certificate
        shown = mixed.credentials()
        mixed._shown = type(shown)(shown.key, shown.certificate, run.authority.certificate, "run")
        assert await refused(address, mixed, "bob") <= {"unavailable", "handshake"}
        assert not desk.asked


@pytest.mark.parametrize("begins", [BACK, 86400])
async def test_entry_out_of_time(run, begins):
    """Expired, or of a machine whose clock ran ahead when it was issued."""
    async with listening(run.guard("alice")) as (desk, address):
        assert await refused(address, naive(run, "bob", begins=begins), "bob") <= {
            "unavailable",
            "handshake",
        }
        assert not desk.asked


async def test_a_certificate_ends_on_an_open_connection(run):
    """It was good when the connection was made; the clock of the callee decides."""
    now = time.time()
    clock = [now]
    guard = Guard(run.keyring("alice", days=5), "alice", clock=lambda: clock[0])
    async with listening(guard) as (_, address):
        link = GrpcLink(address, run.guard("bob"))
        await link.hello(greeting("bob"), 5)
        clock[0] = now + 2 * 86400
        with pytest.raises(PeerRefused) as caught:
            await link.hello(greeting("bob"), 5)
        assert caught.value.reason == "expired"
        await link.close()


async def test_a_revoked_node_is_out_at_once(run):
    """As a caller, in a stream under way, as a callee."""
    guard, mark = run.guard("alice"), run.authority.revoke("eve")
    async with listening(guard) as (desk, address):
        link = GrpcLink(address, naive(run, "eve"))
        await link.hello(greeting("eve"), 5)
        sender = pb.Sender(run="hold", node="eve", session=3)
        request = pb.PullRequest(sender=sender, serial=1)
        async with aclosing(link.pull(request, 20)) as messages:
            assert await anext(messages)
        guard.learn(pb.Revocations(revoked=[pb.Revocation(node="eve", signature=mark)]))
        before = len(desk.asked)
        assert await refused(address, naive(run, "eve"), "eve") == {"revoked"}
        assert len(desk.asked) == before
        await link.close()
    async with listening(naive_guard(run, "eve"), "eve") as (_, address):
        link = GrpcLink(address, guard)
        with pytest.raises(PeerRefused) as caught:
            await link.hello(greeting("alice"), 5)
        assert caught.value.reason == "revoked"
        await link.close()


def naive_guard(run, node):
    """A member's guard that knows of no revocations."""
    return Guard(run.keyring(node), node)


class Endless(Desk):
    """Its blocks have no end."""

    async def pull(self, request):
        """The same bytes again and again."""
        while True:
            yield b"x" * 100_000
            await asyncio.sleep(0)


async def test_a_stream_ends_with_a_revocation(run):
    """What is under way is cut between two messages."""
    guard = run.guard("alice")
    eve = pb.Revocation(node="eve", signature=run.authority.revoke("eve"))

    transport = GrpcTransport("127.0.0.1", 0, guard)
    port = await transport.listen(Endless("alice"), None)
    link = GrpcLink(f"127.0.0.1:{port}", naive(run, "eve"))
    try:
        await link.hello(greeting("eve"), 5)
        request = pb.PullRequest(sender=pb.Sender(run="run", node="eve"))
        with pytest.raises(PeerRefused) as caught:
            async with aclosing(link.pull(request, 60)) as messages:
                async for _ in messages:
                    guard.learn(pb.Revocations(revoked=[eve]))
        assert caught.value.reason == "revoked"
    finally:
        await link.close()
        await transport.close(0)


async def test_a_stream_from_who_is_revoked_ends(run):
    """The caller's end: who sends knows of nothing, or is the very one."""
    bob, alice = run.guard("bob"), run.guard("alice")
    mark = pb.Revocation(node="alice", signature=run.authority.revoke("alice"))

    transport = GrpcTransport("127.0.0.1", 0, alice)
    port = await transport.listen(Endless("alice"), None)
    link = GrpcLink(f"127.0.0.1:{port}", bob)
    got = []
    try:
        await link.hello(greeting("bob"), 5)
        request = pb.PullRequest(sender=pb.Sender(run="run", node="bob"))
        with pytest.raises(PeerRefused) as caught:
            async with aclosing(link.pull(request, 60)) as messages:
                async for message in messages:
                    got.append(message)
                    bob.learn(pb.Revocations(revoked=[mark]))
        assert caught.value.reason == "revoked"
        assert len(got) == 1
    finally:
        await link.close()
        await transport.close(0)


class Watched(Desk):
    """A node whose status changes when it is told so."""

    def __init__(self, name):
        super().__init__(name)
        self.change, self.left = asyncio.Event(), asyncio.Event()

    async def watch_status(self, interval):
        try:
            while True:
                yield pb.NodeStatus(node=self.name)
                await self.change.wait()
        finally:
            self.left.set()


@asynccontextmanager
async def watched(run, guard):
    """A node that can be watched; a function that watches it with credentials, if any."""
    desk, transport = Watched("alice"), GrpcTransport("127.0.0.1", 0, guard)
    socket_file = run.folder / "node.sock"
    run.folder.mkdir(parents=True, exist_ok=True)
    address = f"127.0.0.1:{await transport.listen(desk, desk, None, socket_file)}"
    async with AsyncExitStack() as held:

        async def watch(shown=None, *, local=False):
            link = GrpcLink(f"unix:{socket_file}" if local else address, credentials=shown)
            held.push_async_callback(link.close)
            states = await held.enter_async_context(aclosing(link.watch_status(1)))
            await anext(states)
            return states

        try:
            yield desk, watch
        finally:
            await held.aclose()
            await transport.close(0)


async def test_an_open_status_stream_ends_with_a_revocation(run):
    """At the next status."""
    guard = run.guard("alice")
    shown = Visitor(run.keyring("eve")).credentials()
    mark = pb.Revocation(node="eve", signature=run.authority.revoke("eve"))
    async with watched(run, guard) as (desk, watch):
        states = await watch(shown)
        guard.learn(pb.Revocations(revoked=[mark]))
        desk.change.set()
        with pytest.raises(PeerRefused) as caught:
            await anext(states)
        assert caught.value.reason == "revoked"


async def test_a_members_watchers_keep_nobody_else_out(run):
    """Each has its share; operators and the machine's own tools have places of their own."""
    shown = [Visitor(run.keyring(f"m{number}")).credentials() for number in range(4)]
    operator = Visitor(run.head()).credentials()
    async with watched(run, run.guard("alice")) as (desk, watch):

        async def full(*arguments, **options):
            with pytest.raises(PeerRefused) as caught:
                await watch(*arguments, **options)
            assert caught.value.reason == "too_many_watchers"

        for member in shown[:3]:
            states = [await watch(member) for _ in range(MAX_WATCHERS_PER_CALLER)]
            await full(member)
        await full(shown[3])  # members' places are bounded as well
        await states[0].aclose()
        await desk.left.wait()
        await watch(shown[3])
        for _ in range(KEPT_WATCHERS // 2):
            await watch(operator)
            await watch(local=True)
    async with watched(run, None) as (_, watch):
        for _ in range(MAX_WATCHERS_PER_CALLER):
            await watch()
        with pytest.raises(PeerRefused, match="too many watch it"):
            await watch()
        await watch(local=True)


async def test_who_is_not_on_the_list_stays_out(run):
    """A certificate of the run is not enough where trust.allow names others."""
    async with listening(run.guard("alice", allow=("bob",))) as (_, address):
        assert await refused(address, naive(run, "eve"), "eve") == {"not_allowed"}
        link = GrpcLink(address, run.guard("bob"))
        assert (await link.hello(greeting("bob"), 5)).visit == 7
        await link.close()


async def test_a_member_cannot_speak_for_another(run):
    """In none of the calls."""
    alice = run.guard("alice")
    async with listening(alice) as (desk, address):
        assert await refused(address, naive(run, "eve"), "bob") == {"impostor"}
        assert not desk.asked
        assert alice.refused == {"impostor": 7}  # each of the calls


async def test_an_operator_is_no_member(run):
    """Its certificate makes no peer's call, and no node."""
    visitor = Visitor(run.head())
    async with listening(run.guard("alice")) as (desk, address):
        assert await refused(address, Naive(visitor.credentials()), "alice") == {"not_a_node"}
        assert not desk.asked
        assert (await ask_status(address, 5, visitor.credentials())).node == "bob"
    shown = visitor.credentials()

    class Posing(Naive):
        def admit(self, certificate):
            raise AssertionError

    async with listening(Posing(shown)) as (_, address):
        link = GrpcLink(address, run.guard("bob"))
        with pytest.raises(PeerError):
            await link.hello(greeting("bob"), 5)
        await link.close()


async def test_a_nodes_past_is_told_to_who_is_admitted(run):
    """GetHistory answers as GetStatus does: not whoever has a certificate and is not allowed."""
    async with listening(run.guard("alice", allow=("bob",))) as (_, address):
        told = GrpcLink(address, credentials=run.guard("bob").credentials())
        assert await told.get_history(None, 9, 5)
        await told.close()
        link = GrpcLink(address, credentials=naive(run, "eve").credentials())
        for call in (link.get_history(None, 9, 5), link.get_status(5)):
            with pytest.raises(PeerRefused) as caught:
                await call
            assert caught.value.reason == "not_allowed"
        await link.close()


async def test_who_answers_is_who_it_says(run):
    """A member that says it is another is not believed, nor one that took another's place."""
    bob = run.guard("bob")
    async with listening(run.guard("eve"), "eve", says="alice") as (_, address):
        link = GrpcLink(address, bob)
        with pytest.raises(PeerError):
            await link.hello(greeting("bob"), 5)
        await link.close()
    alice = run.guard("alice")
    transport = GrpcTransport("127.0.0.1", 0, alice)
    port = await transport.listen(Desk("alice"), None)
    link = GrpcLink(f"127.0.0.1:{port}", bob)
    await link.hello(greeting("bob"), 5)
    await transport.close(0)
    # Another member at the same address: what is meant for alice does not reach it.
    usurper, desk = GrpcTransport("127.0.0.1", port, run.guard("eve")), Desk("eve")
    await usurper.listen(desk, None)
    try:
        sender = pb.Sender(run="run", node="bob", session=3)
        with pytest.raises(PeerError):
            await link.goodbye(pb.GoodbyeRequest(sender=sender), 5)
        # A greeting finds out who is there now, and only then others are sent.
        for _ in range(3):
            try:
                reply = await link.hello(greeting("bob"), 5)
                break
            except PeerError:
                continue
        assert reply.sender.node == "eve"
        assert link._node == "eve"
    finally:
        await link.close()
        await usurper.close(0)


async def test_who_calls_itself_another_once_it_is_met_is_an_impostor(run):
    """Its certificate is its own, and so is the name that it gave at first."""

    class Turncoat(Desk):
        async def hello(self, request, source):
            reply = await super().hello(request, source)
            self.name = "alice"
            return reply

    transport = GrpcTransport("127.0.0.1", 0, run.guard("eve"))
    port = await transport.listen(Turncoat("eve"), None)
    link = GrpcLink(f"127.0.0.1:{port}", run.guard("bob"))
    try:
        with pytest.raises(PeerRefused) as caught:
            await link.hello(greeting("bob"), 5)
        assert caught.value.reason == "impostor"
    finally:
        await link.close()
        await transport.close(0)


async def test_downgrade_to_plain_text(run):
    """A member does not call a node, or whoever sits between, that offers no TLS."""
    async with listening(None) as (desk, address):
        assert await refused(address, run.guard("bob"), "bob") == {"handshake"}
        assert not desk.asked
        link = GrpcLink(address, run.guard("bob"))
        with pytest.raises(PeerRefused, match="not under TLS"):
            await link.hello(greeting("bob"), 5)
        await link.close()


async def test_downgrade_to_tls_1_2(run):
    """Neither end accepts it."""
    pair = run.keyring("bob").node("bob")
    files = run.folder / "bob" / "nodes"
    assert pair.key

    def shake(address):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(files / "bob.pem", files / "bob.key")
        context.set_alpn_protocols(["h2"])
        host, port = address.split(":")
        with socket.create_connection((host, int(port)), 5) as plain:
            context.wrap_socket(plain).close()

    async with listening(run.guard("alice")) as (_, address):
        with pytest.raises((ssl.SSLError, OSError)):
            await asyncio.to_thread(shake, address)

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(files / "bob.pem", files / "bob.key")
    context.set_alpn_protocols(["h2"])
    versions = []

    async def serve(_, writer):
        versions.append(writer.get_extra_info("ssl_object").version())
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    async with server:
        link = GrpcLink(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", run.guard("alice"))
        with pytest.raises(PeerError):
            await link.hello(greeting("alice"), 5)
        await link.close()
    assert versions == []


async def test_revocations_spread_with_greetings(run):
    """Told to one, known to all that meet, in either direction of the call."""
    guards = {name: run.guard(name) for name in ("alice", "bob", "carol")}
    eve = pb.Revocation(node="eve", signature=run.authority.revoke("eve"))
    guards["alice"].learn(pb.Revocations(revoked=[eve]))
    async with (
        listening(guards["alice"]) as (_, alice),
        listening(guards["carol"], "carol") as (_, carol),
    ):
        for address in (alice, carol):  # bob asks alice, and carries it to carol
            link = GrpcLink(address, guards["bob"])
            await link.hello(greeting("bob"), 5)
            await link.close()
    assert all(guard.revoked == {"eve"} for guard in guards.values())


async def test_an_operator_can_tell_of_a_revocation(run):
    """Where no node runs beside the authority."""
    guard, visitor = run.guard("alice"), Visitor(run.head())
    eve = pb.Revocation(node="eve", signature=run.authority.revoke("eve"))
    async with listening(guard) as (_, address):
        link = GrpcLink(address, credentials=visitor.credentials())
        await link.exchange_revocations(pb.Revocations(revoked=[eve]), 5)
        await link.close()
    assert guard.revoked == {"eve"}


async def test_renewal_over_the_network(run):
    """A member in its last third gets a new certificate from one that has the authority's key."""
    run.keyring("hub")
    hub = Guard(Keyring(run.folder / "hub"), "hub")
    Keyring(run.folder / "hub").keep_authority(run.authority)
    bob = Guard(run.keyring("bob", begins=-0.9 * 86400), "bob")
    async with listening(hub, "hub") as (_, address):
        link = GrpcLink(address, bob)
        await link.hello(greeting("bob"), 5)
        key = identity.new_key()
        bob.renewed(key, await link.renew(identity.new_request(key), 5))
        assert not bob.is_renewal_due
        # The old connection is given up for one with the new certificate.
        assert (await link.hello(greeting("bob"), 5)).visit == 7
        await link.close()


async def test_connections_are_made_anew_after_an_hour(run):
    """With the next greeting; a stream under way goes on, and calls meanwhile have a connection."""
    async with listening(run.guard("alice")) as (desk, address):
        link = GrpcLink(address, run.guard("bob"))
        await link.hello(greeting("bob"), 5)
        before = link._connection, link._named
        request = pb.PullRequest(sender=pb.Sender(run="hold", node="bob", session=3), serial=1)
        async with aclosing(link.pull(request, 20)) as messages:
            await anext(messages)
            link._since -= 3601
            await link.hello(greeting("bob"), 5)
            assert not {link._connection, link._named} & set(before)
            desk.hold.set()
            assert [message async for message in messages] == []
        await link.close()


async def test_a_person_is_told_what_a_node_wants(run, tmp_path, monkeypatch):
    """No folder, the run's default folder, another program."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    async with listening(run.guard("alice")) as (_, address):
        with pytest.raises(TrustError, match=r"run 'run'.*--trust"):
            await credentials([address])
        (tmp_path / "config" / "deca-node").mkdir(parents=True)
        run.head().folder.rename(tmp_path / "config" / "deca-node" / "run")
        shown = await credentials([address])
        assert (await ask_status(address, 5, shown[address])).node == "bob"
        with pytest.raises(TrustError, match="no such file"):
            await credentials([address], tmp_path)
    async with listening(None) as (_, address):
        assert await credentials([address]) == {}
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    key = identity.new_key()
    request = identity.new_request(key)
    both = tmp_path / "other.pem"
    both.write_bytes(key + run.authority.issue_pairing(request, time.time(), 1))
    context.load_cert_chain(both)
    server = await asyncio.start_server(
        lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=context
    )
    async with server:
        with pytest.raises(UnreachableError, match="not as a deca-node"):
            await credentials([f"127.0.0.1:{server.sockets[0].getsockname()[1]}"])


# Invitations


@asynccontextmanager
async def inviting(run, node=None, ttl=60.0, **options):
    """An inviter that waits; it, its token, and what it tells."""
    told = []
    inviter = Inviter(run.head(), Terms(node, 1.0, ttl), told.append, **options)
    port = await inviter.listen("127.0.0.1", 0)
    word = token(inviter.invitation([f"127.0.0.1:{port}"]))
    waiting = asyncio.create_task(inviter.joined())
    await asyncio.sleep(0)  # it begins to wait
    try:
        yield waiting, read_token(word), told
    finally:
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


@contextlib.asynccontextmanager
async def showing(other, said, heard):
    """Who calls itself an inviter with another authority's certificate; its address.

    ``said`` is bytes, or goes as JSON; what callers send is added to ``heard``. Where it says
    nothing it hangs up.
    """
    key = identity.new_key()
    shown = other.authority.issue_pairing(identity.new_request(key), time.time(), 1)
    other.folder.mkdir(parents=True, exist_ok=True)
    both = other.folder / "fake.pem"
    both.write_bytes(key + shown)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(both)

    async def serve(reader, writer):
        writer.write(said if isinstance(said, bytes) else json.dumps(said).encode() + b"\n")
        with contextlib.suppress(OSError):
            heard.append(await reader.read(1000) if said else b"")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


def opener(folder):
    return lambda authority: Keyring.made(folder, authority)


async def test_joining_by_an_invitation(run, tmp_path):
    """The joiner has a certificate over a key that it made; the token is used up."""
    run.head().keep_revoked({"eve": run.authority.revoke("eve")})
    async with inviting(run) as (waiting, invitation, _):
        joined = await join(invitation, "bob", opener(tmp_path / "bob"), invitation.addresses)
        assert await waiting == "bob"
        guard = Guard(joined.keyring, "bob")
        assert guard.revoked == {"eve"}
        with pytest.raises(TrustError, match="no inviter"):
            await join(invitation, "mallory", opener(tmp_path / "m"), invitation.addresses)
    assert "bob" in run.head().issued()
    async with listening(run.guard("alice")) as (_, address):
        link = GrpcLink(address, guard)
        assert (await link.hello(greeting("bob"), 5)).visit == 7
        await link.close()


async def test_a_damaged_list_lets_nobody_in_and_spends_no_token(run, tmp_path):
    """It is told with its file; once that is mended the same token is good."""
    async with inviting(run) as (waiting, invitation, told):
        damaged = run.head().folder / "revoked.json"
        damaged.write_text("nonsense")
        with pytest.raises(TrustError, match="damaged"):
            await join(invitation, "bob", opener(tmp_path / "b"), invitation.addresses)
        assert "damaged" in told[0]
        assert not run.head().issued()
        damaged.unlink()
        joined = await join(invitation, "bob", opener(tmp_path / "bob"), invitation.addresses)
        assert await waiting == joined.node == "bob"


async def test_a_lost_answer_is_told_to_who_invites(run, monkeypatch):
    """The token is spent and the name taken: what helps is an invitation by that name."""
    async with inviting(run) as (waiting, invitation, _):
        drain, calls = asyncio.StreamWriter.drain, []

        async def lost(writer):
            calls.append(writer)
            if calls.count(writer) == 2:  # the authority's certificate, then the answer
                raise ConnectionResetError
            await drain(writer)

        monkeypatch.setattr(asyncio.StreamWriter, "drain", lost)
        with contextlib.suppress(TrustError):  # it may have got it all the same
            await join(invitation, "bob", opener(run.folder / "bob"), invitation.addresses)
        with pytest.raises(TrustError, match="invite it again with --node bob"):
            await waiting


async def test_a_token_is_good_once(run, tmp_path):
    """Of many that come with it at once, one is let in."""
    async with inviting(run) as (waiting, invitation, _):
        found = await asyncio.gather(
            *(
                join(invitation, f"bob-{i}", opener(tmp_path / f"b{i}"), invitation.addresses)
                for i in range(6)
            ),
            return_exceptions=True,
        )
        joined = [one for one in found if not isinstance(one, BaseException)]
        assert len(joined) == 1
        assert all(isinstance(one, TrustError) for one in found if one not in joined)
        assert await waiting == joined[0].node
    assert set(run.head().issued()) == {joined[0].node}


async def test_an_old_token_does_not_open_a_new_invitation(run, tmp_path):
    """At the same address, from the same authority."""
    async with inviting(run) as (_, old, _), inviting(run) as (_, new, told):
        with pytest.raises(TrustError, match="not let in"):
            await join(old, "eve", opener(tmp_path / "eve"), new.addresses)
        assert len(told) == 1
        assert not run.head().issued()
        assert (await join(new, "bob", opener(tmp_path / "bob"), new.addresses)).node == "bob"


async def test_a_token_is_over_in_time(run, tmp_path):
    """By the clock of the inviter, whatever the joiner's says; and of an honest joiner, too."""
    clock = [time.time()]
    async with inviting(run, ttl=60.0, clock=lambda: clock[0]) as (_, invitation, _):
        clock[0] += 61
        with pytest.raises(TrustError, match="has ended"):
            await join(invitation, "bob", opener(tmp_path / "b"), invitation.addresses)
        with pytest.raises(TrustError, match="by this machine's clock"):
            late = time.time() + 7200
            await join(
                invitation, "bob", opener(tmp_path / "b"), invitation.addresses, lambda: late
            )
    assert not run.head().issued()
    async with inviting(run, ttl=0.05) as (waiting, _, _):
        with pytest.raises(TrustError, match="in time"):
            await waiting


async def test_the_secret_goes_to_the_authority_alone(run, tmp_path):
    """Another authority, or who shows ours without its key, is told nothing."""
    heard = []
    other = Run(tmp_path / "other")
    async with inviting(run) as (_, invitation, _), inviting(other) as (_, _, told):
        async with inviting(other) as (_, imposter, _):
            with pytest.raises(TrustError, match="not who made"):
                await join(invitation, "bob", opener(tmp_path / "b"), imposter.addresses)
        assert not told

        # It copies our authority's certificate, which is no secret, and shows one of its own.
        copied = {"authority": run.authority.certificate.decode()}
        async with showing(other, copied, heard) as address:
            with pytest.raises(TrustError, match="not who made"):
                await join(invitation, "bob", opener(tmp_path / "b"), [address])
        # A member's certificate does not pass for an invitation's either.
        async with listening(run.guard("eve"), "eve") as (_, address):
            with pytest.raises(TrustError, match="no inviter"):
                await join(invitation, "bob", opener(tmp_path / "b"), [address])
        assert (await join(invitation, "bob", opener(tmp_path / "b"), invitation.addresses)).node
    assert not any(heard)


async def test_an_authority_shown_behind_ours_is_not_believed(run, tmp_path):
    """Whoever shows our certificate, and its own behind it, has no say: nor is it kept."""
    heard, other = [], Run(tmp_path / "other")
    both = run.authority.certificate + other.authority.certificate
    async with inviting(run) as (_, invitation, _):
        async with showing(other, {"authority": both.decode()}, heard) as address:
            with pytest.raises(TrustError, match="not who made"):
                await join(invitation, "bob", opener(tmp_path / "b"), [address])
        assert not any(heard)
        joined = await join(invitation, "bob", opener(tmp_path / "b"), invitation.addresses)
    assert joined.keyring.authority == run.authority.certificate


FALSE = {
    "nests": lambda _: b"[" * 100_000 + b"\n",
    "nests within": lambda _: {"authority": json.loads("[" * 900 + "]" * 900)},
    "shows nothing": lambda _: {"authority": "x"},
    "shows no text": lambda _: b'{"authority": "\\ud800"}\n',
    "is no inviter": lambda _: b"hello\n",
    "hangs up": lambda _: b"",
    "copies": lambda run: {"authority": run.authority.certificate.decode()},
}


@pytest.mark.parametrize("what", FALSE)
async def test_who_is_at_an_address_and_is_not_the_inviter_is_passed_over(run, tmp_path, what):
    """Whatever it says; with nobody else there the error is one line that names it."""
    heard, other = [], Run(tmp_path / "other")
    async with inviting(run) as (waiting, invitation, told):
        async with showing(other, FALSE[what](run), heard) as false:
            with pytest.raises(NobodyError, match=f"no inviter for run .*{false}: ") as nobody:
                await join(invitation, "bob", opener(tmp_path / "b"), [false])
            assert "\n" not in str(nobody.value)
            where = [false, *invitation.addresses]
            joined = await join(invitation, "bob", opener(tmp_path / "b"), where)
        assert await waiting == joined.node == "bob"
    assert not any(heard)
    assert not told


async def test_guessing_ends_an_invitation(run, tmp_path):
    """The person who waits is told; the right secret does not help any more."""
    async with inviting(run) as (waiting, invitation, _):
        wrong = type(invitation)(**{**vars(invitation), "secret": bytes(16)})
        for _ in range(MAX_JOIN_ATTEMPTS):
            with pytest.raises(TrustError):
                await join(wrong, "eve", opener(tmp_path / "e"), invitation.addresses)
        with pytest.raises(TrustError, match="somebody is guessing"):
            await waiting
        with pytest.raises(TrustError):
            await join(invitation, "bob", opener(tmp_path / "b"), invitation.addresses)
    assert not run.head().issued()


async def test_nobody_joins_as_another(run, tmp_path):
    """A name that was given is given again only by the inviter; a revoked one never."""
    head = run.head()
    head.issue("bob", identity.new_request(identity.new_key()), time.time(), 1)
    head.keep_revoked({"eve": run.authority.revoke("eve")})
    async with inviting(run) as (_, invitation, _):
        for name, words in (("bob", "already"), ("eve", "revoked"), ("Bob/", "48 characters")):
            with pytest.raises(TrustError, match=words):
                await join(invitation, name, opener(tmp_path / "x"), invitation.addresses)
    async with inviting(run, node="bob") as (_, invitation, _):
        with pytest.raises(TrustError, match="for node 'bob'"):
            await join(invitation, "carol", opener(tmp_path / "x"), invitation.addresses)
        assert (
            await join(invitation, "", opener(tmp_path / "x"), invitation.addresses)
        ).node == "bob"
    with pytest.raises(TrustError, match="for good"):
        async with inviting(run, node="eve"):
            pass


async def idle(invitation, source, held):
    """Connects from an address and says nothing until ``held`` ends; whether it was heard."""
    host, port = invitation.addresses[0].split(":")
    anybody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anybody.check_hostname, anybody.verify_mode = False, ssl.CERT_NONE
    reader, writer = await asyncio.open_connection(host, port, ssl=anybody, local_addr=(source, 0))
    held.callback(writer.close)
    return bool(await reader.readline())


async def test_two_invitations_give_a_name_once(run, monkeypatch):
    """Of two processes one comes while the other has looked who is there, and not yet noted it."""
    monkeypatch.setattr(keyring_module, "_LOCK_SECONDS", 0.0)
    one, other = (Inviter(run.head(), Terms(None, 1.0, 60.0), print) for _ in range(2))
    look, inside = Keyring.issued, []

    def asking(inviter):
        said = {
            "secret": inviter._secret.hex(),
            "node": "bob",
            "request": identity.new_request(identity.new_key()).decode(),
        }
        return inviter._answer(json.dumps(said).encode(), "10.0.0.1")[0]

    def issued(keyring):
        found = look(keyring)
        if not inside:
            inside.append(True)
            inside.append(asking(other))
        return found

    monkeypatch.setattr(Keyring, "issued", issued)
    assert asking(one) == "bob"
    assert inside == [True, ""]
    assert asking(other) == ""


async def test_strangers_do_not_keep_the_joiner_out(run, tmp_path, monkeypatch):
    """Each address has its share of the places; who finds none is told so, and comes again."""
    monkeypatch.setattr(pairing, "CONNECT_SECONDS", 60.0)
    connect = asyncio.open_connection

    def elsewhere(*address, **options):
        return connect(*address, local_addr=("127.0.2.1", 0), **options)

    async with inviting(run) as (waiting, invitation, told), AsyncExitStack() as held:
        heard = [
            await idle(invitation, "127.0.0.1", held) for _ in range(MAX_JOINERS_PER_ADDRESS + 1)
        ]
        assert heard == [True] * MAX_JOINERS_PER_ADDRESS + [False]
        with pytest.raises(TrustError, match="has hung up: busy, try again"):
            await join(invitation, "bob", opener(tmp_path / "b"), invitation.addresses)
        monkeypatch.setattr(asyncio, "open_connection", elsewhere)
        joined = await join(invitation, "bob", opener(tmp_path / "b"), invitation.addresses)
        assert await waiting == joined.node == "bob"
        assert not told


async def test_all_places_of_an_inviter_are_bounded(run, monkeypatch):
    """From however many addresses they come."""
    monkeypatch.setattr(pairing, "CONNECT_SECONDS", 60.0)
    async with inviting(run) as (_, invitation, _), AsyncExitStack() as held:
        sources = [f"127.0.1.{1 + number}" for number in range(MAX_JOINERS + 1)]
        heard = [await idle(invitation, source, held) for source in sources]
        assert heard == [True] * MAX_JOINERS + [False]


async def test_callers_in_vain_do_not_fill_the_terminal(run):
    """Some lines, and how many more there were."""
    told = []
    inviter = Inviter(run.head(), Terms(None, 1.0, 60.0), told.append)
    for _ in range(200):
        assert inviter._answer(b"{}\n", "10.0.0.1")[1]["refusal"]
    assert 0 < len(told) <= MAX_JOIN_ATTEMPTS + 1
    inviter._lines = Turns(1.0, 1.0, 1)
    inviter._answer(b"{}\n", "10.0.0.1")
    assert re.search(r"\(and \d+ callers before\)$", told[-1])


async def test_an_inviter_at_all_addresses_is_reached_by_both_protocols(run, tmp_path):
    """Its token names addresses of both; each caller counts by its own."""
    inviter = Inviter(run.head(), Terms(None, 1.0, 60.0), print)
    port = await inviter.listen("::", 0)
    invitation = inviter.invitation([])
    waiting = asyncio.create_task(inviter.joined())
    counted = []
    enter = inviter._places.enter
    inviter._places.enter = lambda caller: counted.append(caller) or enter(caller)
    wrong = type(invitation)(**{**vars(invitation), "secret": bytes(16)})
    for address in (f"127.0.0.1:{port}", f"[::1]:{port}"):
        with pytest.raises(TrustError, match="not let in"):
            await join(wrong, "bob", opener(tmp_path / "b"), [address])
    assert counted == ["127.0.0.1", "127.0.0.1", "::/64", "::/64"]
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


async def test_a_joiner_believes_no_unsigned_list(run, tmp_path):
    """Of who is out; nothing of the answer is kept, the node's own certificate neither."""
    head = run.head()
    head.keep_revoked({"eve": run.authority.revoke("eve")})
    other = Authority.new("run", time.time())
    lists = ({"mallory": run.authority.revoke("eve")}, {"mallory": other.revoke("mallory")})
    for number, said in enumerate(lists):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Keyring, "revoked", lambda _, said=said: said)
            async with inviting(run) as (_, invitation, _):
                with pytest.raises(TrustError, match="list of revoked nodes is not signed"):
                    await join(
                        invitation, f"b{number}", opener(tmp_path / "b"), invitation.addresses
                    )
    assert Keyring(tmp_path / "b").nodes() == []
    assert Keyring(tmp_path / "b").revoked() == {}


async def test_a_joiner_keeps_only_what_is_its_own(run, tmp_path):
    """An inviter that mixes two joiners up, or certifies another name than it says."""
    keyring, key = Keyring.made(tmp_path / "b", run.authority.certificate), identity.new_key()
    bob, other = (
        run.authority.issue(identity.new_request(each), "bob", time.time(), 1)
        for each in (key, identity.new_key())
    )
    async with inviting(run) as (_, invitation, _):
        for certificate, node, words in (
            (other, "bob", "not the certificate's"),
            (bob, "carol", "certified somebody else"),
            (bob, "Bob", "certified somebody else"),
        ):
            answer = {"certificate": certificate.decode(), "node": node, "revoked": {}}
            with pytest.raises(TrustError, match=words):
                pairing._take(keyring, invitation, key, answer)
            assert keyring.nodes() == []


async def test_an_inviter_speaks_tls_1_3_alone(run):
    """What the secret goes over."""
    anybody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anybody.check_hostname, anybody.verify_mode = False, ssl.CERT_NONE
    async with inviting(run) as (_, invitation, _):
        host, port = invitation.addresses[0].split(":")
        _, writer = await asyncio.open_connection(host, port, ssl=anybody)
        assert writer.get_extra_info("ssl_object").version() == "TLSv1.3"
        writer.close()
        anybody.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises(OSError):  # noqa: PT011 - SSLError or a broken connection
            await asyncio.open_connection(host, port, ssl=anybody)


async def test_noise_at_an_inviter_changes_nothing(run, tmp_path):
    """Plain text, a browser, half a line, nonsense, a line without end."""
    async with inviting(run) as (_, invitation, _):
        host, port = invitation.addresses[0].split(":")
        anybody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        anybody.check_hostname, anybody.verify_mode = False, ssl.CERT_NONE
        for context in (None, anybody):
            for noise in (
                b"GET / HTTP/1.1\r\n\r\n",
                b"{",
                b"[]\n",
                b"\xff\n",
                b"[" * 100_000 + b"\n",
                b"x" * 2_000_000,
            ):
                reader, writer = await asyncio.open_connection(host, port, ssl=context)
                try:
                    writer.write(noise)
                    await writer.drain()
                    await reader.read(100)
                except OSError:
                    pass
                finally:
                    writer.close()
        assert (await join(invitation, "bob", opener(tmp_path / "b"), invitation.addresses)).node
