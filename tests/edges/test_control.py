"""Who can tell a node what to do, and where its socket file is."""

import asyncio
import os
import stat
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from deca_node import cli, registry, steering
from deca_node.checkpoint.manifest import Progress
from deca_node.config import load
from deca_node.control import LOOK_SECONDS, Control
from deca_node.errors import ControlError, PeerRefused
from deca_node.guard import Visitor
from deca_node.keyring import Keyring
from deca_node.membership import Phase
from deca_node.pb import node_pb2 as pb
from deca_node.transport import Caller, services
from deca_node.transport.client import GrpcLink
from deca_node.transport.connection import CONTROL
from deca_node.transport.server import GrpcTransport
from tests.edges.test_registry import _own_folder  # noqa: F401 - nodes of this machine stay out
from tests.edges.test_transport import Answers
from tests.trust import Run
from tests.virtual_time import run

CALLS = {method.name: getattr(pb, f"{method.name}Request")() for method in CONTROL.methods}


class Told:
    """A control handler that notes what it was told."""

    def __init__(self):
        self.verbs = []

    async def pause(self, request):
        self.verbs.append("Pause")
        return pb.PauseReply()

    async def resume(self, request):
        self.verbs.append("Resume")
        return pb.ResumeReply()

    async def checkpoint(self, request):
        self.verbs.append("Checkpoint")
        return pb.CheckpointReply(visit=3)

    async def stop(self, request):
        self.verbs.append("Stop")
        return pb.StopReply(pid=7)

    async def export(self, request):
        self.verbs.append("Export")
        raise PeerRefused("busy", "another one")


@asynccontextmanager
async def node(guard=None):
    """A node that listens on a port and on a socket file."""
    told, desk = Told(), Answers()
    transport = GrpcTransport("127.0.0.1", 0, guard)
    socket = registry.socket_path()
    port = await transport.listen(desk, desk, told, socket)
    try:
        yield told, f"127.0.0.1:{port}", socket
    finally:
        desk.hold.set()
        await transport.close(0)


async def outcomes(link):
    """What each call of the service ends in: a reply's type, or why it was refused."""
    ends = {}
    for verb, request in CALLS.items():
        try:
            ends[verb] = type(await link.control(verb, request, 10)).__name__
        except PeerRefused as error:
            ends[verb] = error.reason
    await link.close()
    return ends


REFUSED = dict.fromkeys(CALLS, "permission_denied")
HEARD = {
    "Pause": "PauseReply",
    "Resume": "ResumeReply",
    "Checkpoint": "CheckpointReply",
    "Stop": "StopReply",
    "Export": "busy",
}


async def test_in_plain_text_nobody_controls_a_node_over_the_network():
    """Neither from this machine's loopback; the socket file is the way."""
    async with node() as (told, address, socket):
        assert await outcomes(GrpcLink(address)) == REFUSED
        assert not told.verbs
        assert await outcomes(GrpcLink(f"unix:{socket}")) == HEARD
        assert told.verbs == list(CALLS)


@pytest.mark.parametrize("verb", sorted(steering.ORDERS))
async def test_no_order_is_given_in_plain_text(verb, monkeypatch):
    """Whoever stands between could say that the node has done it, whatever folder is at hand."""
    monkeypatch.setattr(services, "admitted", lambda context, guard: Caller(operator=True))
    async with node() as (told, address, socket):
        with pytest.raises(ControlError, match=r"plain text.* socket file"):
            await steering.tell(address, None, steering.ORDERS[verb])
        assert not told.verbs
        assert await steering.tell(f"unix:{socket}", None, steering.ORDERS[verb])
        assert told.verbs


async def test_a_status_in_plain_text_does_not_say_that_it_was_encrypted(tmp_path):
    """The asker's own view, also in a run that is meant to be so; under TLS the node's."""

    class Claims(Answers):
        async def get_status(self):
            return pb.NodeStatus(node="alice", security="TLS 1.3", certificate_ends=2e9)

        async def watch_status(self, interval):
            yield await self.get_status()

    async def watched(address, trust=None):
        async with aclosing(cli._states([address], trust, watch=True)) as states:
            return (await anext(states))[0]

    for guard, trust in ((None, None), (Run(tmp_path).guard("alice"), tmp_path / "alice")):
        transport, socket = GrpcTransport("127.0.0.1", 0, guard), registry.socket_path()
        address = f"127.0.0.1:{await transport.listen(Claims(), Claims(), None, socket)}"
        try:
            for at in (address, f"unix:{socket}"):
                found = [await cli._ask([at], trust), await cli._ask([at, at], trust)]
                seen = [*found[0], *found[1], await watched(at, trust)]
                told = guard is not None or at != address
                for now in seen:
                    assert (now.security == "TLS 1.3") == told
                    assert (now.certificate_ends > 0) == told
                    assert ("asked in PLAIN TEXT" in now.security) != told
        finally:
            await transport.close(0)


async def test_under_tls_the_operator_controls_a_node_and_no_peer_does(tmp_path):
    run = Run(tmp_path)
    guard, other = run.guard("alice"), run.guard("bob")
    bob = Visitor(Keyring(run.folder / "bob")).credentials()
    operator = Visitor(run.head()).credentials()
    async with node(guard) as (told, address, socket):
        assert await outcomes(GrpcLink(address, credentials=bob)) == REFUSED
        peer = GrpcLink(address, other)
        peer._node = "alice"
        assert await outcomes(peer) == REFUSED
        assert not told.verbs
        assert await outcomes(GrpcLink(address, credentials=operator)) == HEARD
        assert await outcomes(GrpcLink(f"unix:{socket}")) == HEARD


async def test_the_socket_file_is_its_users_alone_and_answers_status_too():
    """Mode 0600 in a folder of mode 0700; local tools need no certificate there."""
    async with node() as (_, _, socket):
        assert stat.S_IMODE(socket.stat().st_mode) == 0o600
        assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
        link = GrpcLink(f"unix:{socket}")
        assert (await link.get_status(10)).node
        await link.close()
    assert not socket.exists()


def test_a_long_path_for_temporary_files_moves_the_socket_file(tmp_path, monkeypatch):
    """The system takes 107 bytes of a path at most."""
    deep = tmp_path / ("x" * 60) / ("y" * 60)
    deep.mkdir(parents=True)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    path = registry.socket_path()
    assert path is not None
    assert len(os.fsencode(path)) <= registry.MAX_SOCKET_PATH_BYTES
    assert path.parent == Path(f"/tmp/deca-node-{os.getuid()}")


def test_a_folder_of_somebody_else_is_no_place_for_it(monkeypatch):
    def foreign(folder):
        raise PermissionError(folder)

    monkeypatch.setattr(registry, "_own", foreign)
    assert registry.socket_path() is None


def test_a_dead_nodes_socket_file_is_removed_with_its_entry(monkeypatch):
    socket = registry.socket_path()
    socket.touch()
    monkeypatch.setattr(os, "getpid", lambda: 2**22 + 1)  # above any process's number
    with registry.announce("127.0.0.1:7", "run", "alice", "", str(socket)):
        assert registry.local_nodes() == []
    assert not socket.exists()


async def test_a_pause_that_could_not_save_is_no_checkpoint(tmp_path):
    """Or else an operator would switch the machine off and lose what is not on disk."""
    chosen = load(None, ["model.path=m", "data.train=d", f"node.output={tmp_path}"])
    paused = SimpleNamespace(
        phase=Phase.PAUSED, progress=Progress(visit=2, step=1), position=lambda: paused
    )
    control = Control(chosen, paused, lambda: None, asyncio.Event())
    control.member = paused
    control.saved(done=False)
    with pytest.raises(PeerRefused, match="could not be saved when it paused"):
        await control.checkpoint(pb.CheckpointRequest())
    control.saved(done=True)
    reply = await control.checkpoint(pb.CheckpointRequest())
    assert (reply.visit, reply.step) == (2, 1)


@pytest.mark.parametrize("phase", [Phase.CATCHING_UP, Phase.AGREEING, Phase.SERVING])
def test_a_checkpoint_is_refused_where_no_step_will_save(tmp_path, phase):
    """At once, or when it comes to that; a step that takes long is waited for."""
    chosen = load(None, ["model.path=m", "data.train=d", f"node.output={tmp_path}"])
    member = SimpleNamespace(phase=Phase.TRAINING, position=lambda: member)

    async def scenario():
        control = Control(chosen, member, lambda: None, asyncio.Event())
        control.member = member
        asked = asyncio.create_task(control.checkpoint(pb.CheckpointRequest()))
        await asyncio.sleep(900)
        assert control.is_save_due
        member.phase = phase
        for asking in (asked, control.checkpoint(pb.CheckpointRequest())):
            with pytest.raises(PeerRefused) as caught:
                await asyncio.wait_for(asking, LOOK_SECONDS)
            assert caught.value.reason == "not_now"
        assert not control.is_save_due

    run(scenario())
