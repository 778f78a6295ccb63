"""What a running node does for its trust: renewals, revocations, and who is told of trouble."""

import contextlib
import errno
import time
from types import SimpleNamespace

import filelock
import pytest
import structlog

from deca_node import identity
from deca_node import keyring as keyring_module
from deca_node.errors import PeerRefused
from deca_node.guard import Guard
from deca_node.keyring import Keyring, Pair
from deca_node.membership import Peer, Phase, State
from deca_node.pb import node_pb2 as pb
from deca_node.upkeep import Upkeep
from tests.edges.test_keyring import of_an_unknown_kind
from tests.trust import Run

DUE = -0.9 * 86400


class Swarm:
    """Stands for a swarm whose peers answer requests for a renewal."""

    def __init__(self, answers):
        self.answers, self.out = answers, []
        self.peers = {
            name: Peer(name, 1, "10.0.0.1:1", State.ALIVE, Phase.TRAINING, 0, 0.0)
            for name in answers
        }

    def link(self, name):
        async def renew(request, timeout):
            return self.answers[name](request)

        return SimpleNamespace(renew=renew)

    def put_out(self, name):
        self.out.append(name)


def no_authority(request):
    raise PeerRefused("no_authority")


async def look(guard, answers):
    """One look around; who was put out, and what was said."""
    said, swarm = [], Swarm(answers)
    upkeep = Upkeep(guard, said.append, structlog.get_logger())
    upkeep.look(SimpleNamespace(swarm=swarm))
    if upkeep._renewing is not None:
        await upkeep._renewing
    await upkeep.end()
    return swarm.out, said


async def test_a_certificate_is_renewed_by_whoever_has_the_key(tmp_path):
    """Peers are asked until one gives what can be used; a bad answer is passed over."""
    run = Run(tmp_path)
    guard = Guard(run.keyring("bob", begins=DUE), "bob")

    def wrong(request):
        return run.authority.issue(request, "alice", time.time(), 1)

    def right(request):
        return run.authority.issue(request, "bob", time.time(), 1)

    def strange(request):
        return of_an_unknown_kind(right(request))

    answers = {"a": no_authority, "b": wrong, "s": strange, "c": right, "d": no_authority}
    assert await look(guard, answers) == ([], [])
    assert not guard.is_renewal_due


async def test_it_is_renewed_here_where_the_key_is(tmp_path):
    """Nobody is asked, and the new one is noted as issued."""
    run = Run(tmp_path)
    keyring = run.keyring("hub", begins=DUE)
    keyring.keep_authority(run.authority)
    guard = Guard(keyring, "hub")
    assert await look(guard, {}) == ([], [])
    assert not guard.is_renewal_due
    assert keyring.issued_certificate("hub").ends == guard.ends


async def test_the_operators_is_renewed_where_the_key_is(tmp_path):
    """It would end while every question is asked with it; not before it is due."""
    run = Run(tmp_path)
    head, hub = run.head(), run.keyring("hub")
    request = identity.new_request(key := identity.new_key())
    shown = run.authority.issue_operator(request, time.time() + DUE, 1.0)
    for keyring in (head, hub):
        keyring.keep_operator(Pair(key, shown))
    await look(Guard(hub, "hub"), {})
    assert hub.operator().certificate == shown  # the authority's key is elsewhere
    hub.keep_authority(run.authority)
    await look(Guard(hub, "hub"), {})
    renewed = hub.operator()
    assert renewed.says.ends > time.time() + 0.9 * 86400
    assert renewed.says.holder.operator
    await look(Guard(hub, "hub"), {})
    assert hub.operator() == renewed


async def test_a_renewal_that_nobody_gives_is_said(tmp_path):
    """With the date, and what to do."""
    guard = Guard(Run(tmp_path).keyring("bob", begins=DUE), "bob")
    _, (said,) = await look(guard, {"a": no_authority})
    assert "expires on 20" in said
    assert "swarm invite" in said


async def test_who_is_revoked_is_put_out_also_this_node(tmp_path):
    """By another process's word as well."""
    run = Run(tmp_path)
    guard = run.guard("alice")
    revoked = {name: run.authority.revoke(name) for name in ("eve", "alice")}
    Keyring(run.folder / "alice").keep_revoked(revoked)
    out, (said,) = await look(guard, {"eve": no_authority})
    assert set(out) == {"eve", "alice"}
    assert said.startswith("the others refuse this node")


async def test_a_revocation_that_cannot_be_written_is_in_force(tmp_path):
    """And is written when it can be."""
    run = Run(tmp_path)
    guard = run.guard("alice")
    place = run.folder / "alice" / "revoked.json"
    place.mkdir()  # nothing can be put in its place
    signed = pb.Revocation(node="eve", signature=run.authority.revoke("eve"))
    guard.learn(pb.Revocations(revoked=[signed]))
    assert guard.revoked == {"eve"}
    out, said = await look(guard, {})
    assert out == ["eve"]
    assert [line.partition(":")[0] for line in said] == [
        "what was known before stays in force",
        "a revocation is in force but could not be saved, and is lost when this node stops",
    ]
    place.rmdir()
    assert await look(guard, {}) == (["eve"], [])
    assert Keyring(run.folder / "alice").revoked().keys() == {"eve"}


@pytest.fixture
def read_only(monkeypatch):
    """While it is entered no folder can be written, as of a secret that is mounted."""

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    @contextlib.contextmanager
    def mounted():
        with monkeypatch.context() as patched:
            patched.setattr(keyring_module.filelock, "FileLock", refuse)
            patched.setattr(keyring_module, "_write", refuse)
            yield

    return mounted


async def test_what_cannot_be_written_keeps_nobody_from_reading(tmp_path, read_only):
    """A node whose folder is mounted read-only takes up what the orchestrator puts there."""
    run = Run(tmp_path)
    guard, said = run.guard("alice"), []
    upkeep = Upkeep(guard, said.append, structlog.get_logger())
    signed = pb.Revocation(node="eve", signature=run.authority.revoke("eve"))
    with read_only():
        guard.learn(pb.Revocations(revoked=[signed]))
    put = run.keyring("alice", days=2)
    put.keep_revoked({"mallory": run.authority.revoke("mallory")})
    with read_only():
        for _ in range(2):
            upkeep.look(None)
    assert guard.revoked == {"eve", "mallory"}
    assert guard.credentials().certificate == put.node("alice").certificate
    (line,) = said
    assert line.startswith("a revocation is in force but could not be saved, ")
    assert line.endswith("cannot be written: Read-only file system")


@pytest.mark.parametrize("here", [True, False])
async def test_a_renewal_that_cannot_be_written_is_used(tmp_path, read_only, here):
    """One peer is asked, not all in turn; it is said what is wrong, and written when it can be."""
    run, asked = Run(tmp_path), []
    keyring = run.keyring("bob", begins=DUE)
    if here:
        keyring.keep_authority(run.authority)
    guard, said = Guard(keyring, "bob"), []

    def right(request):
        asked.append(request)
        return run.authority.issue(request, "bob", time.time(), 1)

    upkeep = Upkeep(guard, said.append, structlog.get_logger())
    member = SimpleNamespace(swarm=Swarm({"a": right, "b": right}))
    with read_only():
        upkeep.look(member)
        await upkeep._renewing
        assert not guard.is_renewal_due
        assert len(asked) == (0 if here else 1)
        (keyring.folder / "nodes" / "bob.key").touch()  # what lies there is the old pair still
        for _ in range(2):
            upkeep.look(member)
        assert not guard.is_renewal_due
        (line,) = said
        assert line.startswith("a renewed certificate is in use but could not be saved, ")
        assert line.endswith("bob.pem: cannot be written: Read-only file system")
    upkeep.look(member)
    assert keyring.node("bob").certificate == guard.credentials().certificate
    assert len(said) == 1


async def test_a_peers_word_waits_for_no_other_process(tmp_path, monkeypatch):
    """The loop that hears it serves everybody; the next look writes it."""
    run = Run(tmp_path)
    guard, said = run.guard("alice"), []
    upkeep = Upkeep(guard, said.append, structlog.get_logger())
    signed = pb.Revocation(node="eve", signature=run.authority.revoke("eve"))
    lock, patience = filelock.FileLock, []

    def noted(path, timeout, **options):
        patience.append(timeout)
        return lock(path, timeout=timeout, **options)

    with lock(run.folder / "alice" / ".lock"), monkeypatch.context() as patched:
        patched.setattr(keyring_module.filelock, "FileLock", noted)
        guard.learn(pb.Revocations(revoked=[signed]))
        upkeep.look(None)
    assert patience == [0, 0]
    assert guard.revoked == {"eve"}
    assert "another process holds it" in said[0]
    upkeep.look(None)
    assert Keyring(run.folder / "alice").revoked().keys() == {"eve"}


async def test_a_key_that_cannot_renew_is_said_as_it_is(tmp_path):
    """Not that nobody had one."""
    keyring = Run(tmp_path).keyring("hub", begins=DUE)
    (keyring.folder / "authority.key").write_bytes(b"no key")
    (keyring.folder / "authority.key").chmod(0o600)
    _, said = await look(Guard(keyring, "hub"), {})
    assert any("could not be renewed: " in line and "private key" in line for line in said)
    assert not any("no running node" in line for line in said)


def test_a_renewed_certificate_is_good_for_as_long(tmp_path):
    """Also after many renewals."""
    run = Run(tmp_path)
    keyring, now = run.keyring("hub", days=2.0), [time.time()]
    keyring.keep_authority(run.authority)
    guard = Guard(keyring, "hub", clock=lambda: now[0])
    for _ in range(3):
        now[0] += 1.5 * 86400
        guard.renew_here()
        assert abs(guard.ends - now[0] - 2 * 86400) < 2


def test_keys_of_a_renewal_are_new(tmp_path):
    """The old key is not certified again."""
    run = Run(tmp_path)
    keyring = run.keyring("hub", begins=DUE)
    keyring.keep_authority(run.authority)
    before = keyring.node("hub")
    Guard(keyring, "hub").renew_here()
    after = keyring.node("hub")
    assert after.key != before.key
    identity.check_pair(after.key, after.certificate, run.authority.certificate)
