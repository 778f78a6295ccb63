"""The trust folder: what is in it, who can read it, what is wrong with it."""

import errno
import os
import ssl
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from deca_node import guard as guard_module
from deca_node import identity
from deca_node import keyring as keyring_module
from deca_node.errors import PeerRefused, TrustError
from deca_node.guard import Guard, Visitor
from deca_node.identity import Authority
from deca_node.keyring import Keyring, Pair
from deca_node.limits import MAX_CERTIFICATE_BYTES
from deca_node.pb import node_pb2 as pb
from deca_node.trust import CLOCK_SECONDS, Holder
from tests.trust import Run


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def test_keys_are_for_their_owner_alone(run):
    """Files of mode 0600 in folders of mode 0700, and no temporary ones left."""
    keyring = run.head()
    run.keyring("alice")
    left = run.folder / "alice" / "nodes" / f"alice.key.new.{os.getpid()}.tmp"
    left.touch(0o644)  # by a process of the same number that was killed
    run.keyring("alice")
    for path in run.folder.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path
        assert path.suffix != ".tmp"
    assert keyring.open_authority().run == "run"


def test_a_certificate_says_whom_it_names(run):
    """A node's, an operator's; the authority's and an invitation's name nobody."""
    assert run.keyring("alice").node("alice").says.holder == Holder("run", "alice", operator=False)
    head = run.head()
    assert head.operator().says.holder == Holder("run", None, operator=True)
    assert identity.read(head.authority).holder is None
    request = identity.new_request(identity.new_key())
    pairing = run.authority.issue_pairing(request, time.time(), 1)
    assert identity.read(pairing).holder is None


def test_a_members_certificate_is_good_before_it_was_made_and_for_no_others(run):
    """The clocks of two machines differ; and only the authority signs certificates."""
    certificate = run.keyring("alice").node("alice").certificate
    said = identity.read(certificate)
    assert said.begins == pytest.approx(time.time() - CLOCK_SECONDS, abs=60)
    assert said.ends == pytest.approx(time.time() + 86400, abs=60)
    assert identity.run_of(run.authority.certificate) == "run"
    with pytest.raises(TrustError, match="not the certificate of a run's authority"):
        identity.run_of(certificate)


def test_a_certificate_is_good_at_one_end_or_at_both(run):
    """An operator answers nobody, and an invitation's certificate opens no node."""

    def uses(certificate):
        found = x509.load_pem_x509_certificate(certificate).extensions
        return {each._name for each in found.get_extension_for_class(x509.ExtendedKeyUsage).value}

    request = identity.new_request(identity.new_key())
    assert uses(run.authority.issue(request, "alice", time.time(), 1)) == {
        "serverAuth",
        "clientAuth",
    }
    assert uses(run.authority.issue_operator(request, time.time(), 1)) == {"clientAuth"}
    assert uses(run.authority.issue_pairing(request, time.time(), 1)) == {"serverAuth"}


def test_a_request_is_signed_by_a_p256_key_of_its_own(run):
    """Else somebody would be certified over a key that is another's, or that TLS cannot use."""
    good = x509.load_pem_x509_csr(identity.new_request(identity.new_key()))
    der = bytearray(good.public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    forged = x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    other = builder.sign(ec.generate_private_key(ec.SECP384R1()), hashes.SHA256())
    curve = other.public_bytes(serialization.Encoding.PEM)
    long = b"#" * MAX_CERTIFICATE_BYTES + identity.new_request(identity.new_key())
    for request, words in ((forged, "of its own"), (curve, "of its own"), (long, "too long")):
        with pytest.raises(TrustError, match=words):
            run.authority.issue(request, "alice", time.time(), 1)


def test_a_key_outlasts_a_power_cut(run, monkeypatch):
    """A name is given to bytes that are on the disk, and then synced itself."""
    keyring, done = run.keyring("alice"), []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor):
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def replaced(path, target):
        done.append("name")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    keyring.keep_revoked({"eve": run.authority.revoke("eve")})
    assert done == ["file", "name", "folder"]


@pytest.mark.parametrize("version", ["a003020103", "a003020101"])
def test_a_certificate_of_another_version_is_one_line(run, version):
    """X.509 knows 1 and 3, and the library raises errors of its own at any other."""
    certificate = run.keyring("alice").node("alice").certificate
    der = ssl.PEM_cert_to_DER_cert(certificate.decode())
    third = bytes.fromhex("a003020102")
    assert third in der
    odd = ssl.DER_cert_to_PEM_cert(der.replace(third, bytes.fromhex(version), 1)).encode()
    with pytest.raises(TrustError):
        identity.read(odd)
    hub = Guard(run.keyring("hub"), "hub")
    for nothing in (odd, b""):
        with pytest.raises(PeerRefused):
            hub.renew_for(nothing, b"")


@pytest.mark.parametrize("crash", range(1, 9))
@pytest.mark.parametrize("first", [True, False])
def test_a_replacement_that_is_cut_off_leaves_a_pair(run, monkeypatch, crash, first):
    """Power fails at each change of the disk in turn: the old pair is there, or the new one."""
    keyring = run.keyring("alice")
    if first:
        for path in (keyring.folder / "nodes").iterdir():
            path.unlink()
    key = identity.new_key()
    request = identity.new_request(key)
    pair = Pair(key, run.authority.issue(request, "alice", time.time(), 1.0))
    replace, done = Path.replace, []

    class PowerCutError(Exception):
        pass

    def cut(path, target):
        done.append(path)
        if len(done) == -(-crash // 2) and crash % 2:
            raise PowerCutError  # just before
        found = replace(path, target)
        if len(done) == -(-crash // 2):
            raise PowerCutError  # just after
        return found

    before = None if first else keyring.node("alice")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", cut)
        if crash <= 6:
            with pytest.raises(PowerCutError):
                keyring.keep_node("alice", pair)
        else:
            keyring.keep_node("alice", pair)
    again = Keyring(keyring.folder)
    if first and again.nodes() == []:
        return  # it has never been
    found = again.node("alice")
    assert found in (before, pair)
    assert found == pair or crash < 4
    again.keep_node("alice", pair)
    assert again.node("alice") == pair
    assert {path.name for path in (again.folder / "nodes").iterdir()} == {"alice.key", "alice.pem"}


def test_a_second_replacement_that_is_cut_off_leaves_a_pair_as_well(run, monkeypatch):
    """The first had got as far as its certificate, whose key is then the only one that fits."""
    keyring = run.keyring("alice")

    def cut_at(number):
        replace, done = Path.replace, []

        def cut(path, target):
            done.append(path)
            if len(done) == number:
                raise OSError(errno.EIO, "power cut")
            return replace(path, target)

        return cut

    key = identity.new_key()
    certificate = run.authority.issue(identity.new_request(key), "alice", time.time(), 2.0)
    for number in (3, 3):  # of the second, the first replacement ends what is left of the first
        with monkeypatch.context() as patched:
            patched.setattr(Path, "replace", cut_at(number))
            with pytest.raises(TrustError):
                keyring.keep_node("alice", Pair(key, certificate))
        assert Keyring(keyring.folder).node_certificate("alice").ends
    assert Keyring(keyring.folder).node("alice") == Pair(key, certificate)
    fresh = identity.new_key()
    other = run.authority.issue(identity.new_request(fresh), "alice", time.time(), 3.0)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", cut_at(3))
        with pytest.raises(TrustError):
            keyring.keep_node("alice", Pair(fresh, other))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", cut_at(2))
        with pytest.raises(TrustError):
            keyring.keep_node("alice", Pair(key, certificate))
    assert Keyring(keyring.folder).node("alice") == Pair(fresh, other)


def test_half_a_replacement_is_read_where_nothing_can_be_written(run, monkeypatch):
    """A secret mounted read-only, say, of a machine that lost its power."""
    keyring = run.keyring("alice")
    folder = keyring.folder / "nodes"
    key = identity.new_key()
    pair = Pair(key, run.authority.issue(identity.new_request(key), "alice", time.time(), 2.0))
    (folder / "alice.pem").write_bytes(pair.certificate)
    new = folder / "alice.key.new"
    new.write_bytes(pair.key)
    new.chmod(0o644)
    assert keyring.readable_by_others() == [
        f"{new}: others can read or change this key; chmod 600 {new}"
    ]

    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr(keyring_module.filelock, "FileLock", read_only)
        with pytest.raises(TrustError, match="others can read"):
            keyring.node("alice")
        new.chmod(0o600)
        assert keyring.node("alice") == pair
        assert new.exists()
    assert keyring.node("alice") == pair
    assert not new.exists()


def test_processes_that_replace_one_pair_leave_a_pair_at_every_moment(run):
    """An operator renews by hand while the node does so itself, and others read."""
    run.keyring("alice")
    pairs = []
    for _ in range(6):
        key = identity.new_key()
        request = identity.new_request(key)
        pairs.append(Pair(key, run.authority.issue(request, "alice", time.time(), 2.0)))
    with ThreadPoolExecutor(8) as pool:
        writers = [
            pool.submit(Keyring(run.folder / "alice").keep_node, "alice", pair)
            for pair in pairs * 4
        ]
        reads = 0
        while not all(writer.done() for writer in writers):
            Keyring(run.folder / "alice").node("alice")
            reads += 1
        for writer in writers:
            writer.result()
    assert reads > 1
    assert Keyring(run.folder / "alice").node("alice") in pairs


def test_what_another_process_writes_while_a_revocation_is_kept_is_taken_up(run, monkeypatch):
    """A certificate before it, another revocation right after it."""
    keyring, other = run.keyring("alice"), Keyring(run.folder / "alice")
    guard = Guard(keyring, "alice")
    key = identity.new_key()
    pair = Pair(key, run.authority.issue(identity.new_request(key), "alice", time.time(), 2.0))
    other.keep_node("alice", pair)
    keep = keyring.keep_revoked

    def kept(revoked, **options):
        found = keep(revoked, **options)
        other.keep_revoked({"mallory": run.authority.revoke("mallory")})
        return found

    monkeypatch.setattr(keyring, "keep_revoked", kept)
    mark = pb.Revocation(node="eve", signature=run.authority.revoke("eve"))
    guard.learn(pb.Revocations(revoked=[mark]))
    assert guard.refresh()
    assert guard.revoked == {"eve", "mallory"}
    assert guard.credentials().certificate == pair.certificate
    assert not guard.refresh()


def test_a_list_that_could_not_be_read_again_is_not_written(run, monkeypatch):
    """What is there stays."""
    monkeypatch.setattr(keyring_module, "MAX_REVOKED", 2)
    keyring = run.head()
    keyring.keep_revoked({name: run.authority.revoke(name) for name in ("eve", "mallory")})
    with pytest.raises(TrustError, match="more than 2"):
        keyring.keep_revoked({"trudy": run.authority.revoke("trudy")})
    assert set(keyring.revoked()) == {"eve", "mallory"}


def test_revocations_of_several_processes_are_all_kept(run):
    """Each reads, adds and writes; no word of another is lost."""
    names = [f"eve-{number}" for number in range(12)]
    run.head()

    def revoke(name):
        Keyring(run.folder / "head").keep_revoked({name: run.authority.revoke(name)})

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(revoke, names))
    assert set(Keyring(run.folder / "head").revoked()) == set(names)


def of_an_unknown_kind(certificate):
    """The certificate with a key of an algorithm that nobody has heard of."""
    der = ssl.PEM_cert_to_DER_cert(certificate.decode())
    algorithm = bytes.fromhex("2a8648ce3d0201")  # id-ecPublicKey (RFC 5480)
    assert algorithm in der
    return ssl.DER_cert_to_PEM_cert(der.replace(algorithm, algorithm[:-1] + b"\x7f")).encode()


def test_a_certificate_of_an_unknown_kind_is_one_line(run):
    """The library has errors of its own for it."""
    keyring = run.keyring("alice")
    path = keyring.folder / "nodes" / "alice.pem"
    path.write_bytes(of_an_unknown_kind(path.read_bytes()))
    with pytest.raises(TrustError, match=r"alice\.pem"):
        keyring.node("alice")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), "no such file"),
        (lambda path: path.write_bytes(b""), "not a private key"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "not a private key"),
        (lambda path: path.write_bytes(b"x" * 10_000), "too long"),
        (lambda path: path.write_bytes(identity.new_key()), "not the certificate's"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be read"),  # also for root
        (lambda path: path.chmod(0o644), "chmod 600"),
        (lambda path: path.chmod(0o660), "chmod 600"),
    ],
)
def test_a_bad_key_is_one_line(run, damage, words):
    """The file is named, whatever is wrong with it."""
    keyring = run.keyring("alice")
    path = keyring.folder / "nodes" / "alice.key"
    damage(path)
    with pytest.raises(TrustError, match=words) as caught:
        keyring.node("alice")
    pair = "certificate's" in words  # either file may be the wrong one
    assert f"nodes/alice.{'pem' if pair else 'key'}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_group_may_read_a_key(run):
    """That is how orchestrators hand secrets to a daemon that is not root."""
    keyring = run.keyring("alice")
    key = keyring.folder / "nodes" / "alice.key"
    key.chmod(0o440)
    assert keyring.node("alice").key
    assert keyring.readable_by_others() == []
    key.chmod(0o640)  # no secret of an orchestrator: its owner can change it
    assert keyring.node("alice").key
    assert keyring.readable_by_others() == [f"{key}: its group can read this key; chmod 600 {key}"]


@pytest.mark.parametrize("mode", [0o664, 0o646])
@pytest.mark.parametrize("name", ["authority.pem", "nodes/alice.pem", "revoked.json"])
def test_what_others_can_change_is_refused(run, name, mode):
    """They would say whom a node believes; a copy with a lax umask has such a mode."""
    keyring = run.keyring("alice")
    keyring.keep_revoked({"eve": run.authority.revoke("eve")})
    path = keyring.folder / name
    path.chmod(mode)
    with pytest.raises(TrustError, match=rf"{name}: others can change .*; chmod go-w .*{name}"):
        Guard(Keyring(keyring.folder), "alice")
    path.chmod(0o444)  # as of a secret that is mounted
    assert Guard(Keyring(keyring.folder), "alice").revoked == {"eve"}


def test_a_folder_belongs_to_one_authority(run, tmp_path):
    """Another run's of the same name is another."""
    keyring = run.keyring("alice")
    with pytest.raises(TrustError, match="another authority"):
        Keyring.made(keyring.folder, Authority.new("run", time.time()).certificate)
    with pytest.raises(TrustError, match="'run', not 'other'"):
        Keyring.of_run(keyring.folder, "other")
    with pytest.raises(TrustError, match="swarm init"):
        Keyring(tmp_path / "nowhere")


def test_a_certificate_of_another_authority_is_no_good(run, tmp_path):
    """Although it names the same node of a run of the same name."""
    keyring = run.keyring("alice")
    other = Run(tmp_path / "other").keyring("alice").node("alice")
    keyring.keep_node("alice", other)
    with pytest.raises(TrustError, match="another authority"):
        Guard(keyring, "alice")


@pytest.mark.parametrize(
    ("begins", "days", "words"),
    [(-3 * 86400, 1, "its certificate expired on "), (86400, 1, "set the clock")],
)
def test_a_node_whose_certificate_is_out_of_time_does_not_start(run, begins, days, words):
    """Expired, or the clock is wrong."""
    with pytest.raises(TrustError, match=words):
        Guard(run.keyring("alice", begins=begins, days=days), "alice")


def test_a_node_does_not_start_with_anothers_certificate(run):
    keyring = run.keyring("alice")
    keyring.keep_node("alice", run.keyring("bob").node("bob"))
    with pytest.raises(TrustError, match="'alice' names another"):
        Guard(keyring, "alice")


def test_who_lists_others_need_not_list_itself(run):
    """What runs beside a node shows the node's own certificate to it."""
    guard = run.guard("alice", allow=("bob",))
    own = guard.credentials().certificate
    assert guard.admit(own).node == "alice"
    assert guard.admit(run.keyring("bob").node("bob").certificate).node == "bob"
    with pytest.raises(PeerRefused) as caught:
        guard.admit(run.keyring("carol").node("carol").certificate)
    assert caught.value.reason == "not_allowed"


def test_revocations_are_signed(run):
    """One that the authority has not signed, or for another node or run, is refused."""
    guard, mark = run.guard("alice"), run.authority.revoke("eve")
    other = Authority.new("run", time.time()).revoke("eve")
    for node, signature in (
        ("bob", mark),
        ("eve", other),
        ("eve", b""),
        ("", run.authority.revoke("")),  # nor is what can be no node's name
        ("a\nb", run.authority.revoke("a\nb")),
    ):
        with pytest.raises(PeerRefused, match="not signed"):
            guard.learn(pb.Revocations(revoked=[pb.Revocation(node=node, signature=signature)]))
    assert not guard.revoked
    assert guard.digest() == 0
    guard.learn(pb.Revocations(revoked=[pb.Revocation(node="eve", signature=mark)]))
    assert guard.revoked == {"eve"}
    assert Guard(Keyring(run.folder / "alice"), "alice").revoked == {"eve"}


def test_a_list_that_grows_without_end_is_not_learned(run, monkeypatch):
    """Each is a check, a place in memory, and a line of a file that is read at every look."""
    monkeypatch.setattr(guard_module, "MAX_REVOKED", 2)
    guard = run.guard("alice")
    marks = [
        pb.Revocation(node=name, signature=run.authority.revoke(name))
        for name in ("eve", "mallory", "trudy")
    ]
    with pytest.raises(PeerRefused) as caught:
        guard.learn(pb.Revocations(revoked=marks))
    assert caught.value.reason == "bad_list"
    assert not guard.revoked
    guard.learn(pb.Revocations(revoked=marks[:2]))
    guard.learn(pb.Revocations(revoked=marks[:2]))  # known, and none more
    assert guard.revoked == {"eve", "mallory"}


def test_two_that_know_different_revocations_come_to_know_both(run):
    """In whatever order; then their digests are equal."""
    guards = [run.guard(name) for name in ("alice", "bob")]
    for guard, node in zip(guards, ("eve", "mallory"), strict=True):
        signed = pb.Revocation(node=node, signature=run.authority.revoke(node))
        guard.learn(pb.Revocations(revoked=[signed]))
    assert guards[0].digest() != guards[1].digest()
    guards[1].learn(guards[0].revocations())
    guards[0].learn(guards[1].revocations())
    assert guards[0].digest() == guards[1].digest()
    assert guards[0].revoked == {"eve", "mallory"}


def test_a_damaged_list_of_revocations_trusts_nobody(run):
    """Empty would mean that all are welcome."""
    keyring = run.keyring("alice")
    for text in ("", "[]", '{"eve": "00"}', '{"eve": 1}', "{" * 100):
        (keyring.folder / "revoked.json").write_text(text)
        with pytest.raises(TrustError, match="damaged"):
            Guard(keyring, "alice")


def test_a_revoked_node_does_not_start(run):
    """It is told why."""
    keyring = run.keyring("alice")
    keyring.keep_revoked({"alice": run.authority.revoke("alice")})
    with pytest.raises(TrustError, match="another name"):
        Guard(keyring, "alice")


def test_what_another_process_changes_is_taken_up(run):
    """A revocation and a renewal; damage leaves what was known in force."""
    keyring = run.keyring("alice")
    guard = Guard(keyring, "alice")
    before = guard.credentials()
    assert not guard.refresh()
    keyring.keep_revoked({"eve": run.authority.revoke("eve")})
    assert guard.refresh()
    assert guard.revoked == {"eve"}
    run.keyring("alice", days=2)
    assert guard.refresh()
    assert guard.credentials() is not before
    (keyring.folder / "revoked.json").write_text("nonsense")
    for _ in range(2):  # Upkeep says it once
        with pytest.raises(TrustError, match="damaged"):
            guard.refresh()
    assert guard.revoked == {"eve"}


def test_what_could_not_be_read_is_taken_up_after_the_remedy(run):
    """Mode and owner are put right, or the other half arrives; no content may change with it."""
    keyring = run.keyring("alice")
    guard = Guard(keyring, "alice")
    nodes = keyring.folder / "nodes"

    def renewed(days):
        key = identity.new_key()
        return Pair(key, run.authority.issue(identity.new_request(key), "alice", time.time(), days))

    pair = renewed(2.0)
    (nodes / "alice.key").write_bytes(pair.key)
    (nodes / "alice.key").chmod(0o644)
    (nodes / "alice.pem").write_bytes(pair.certificate)
    with pytest.raises(TrustError, match="chmod 600"):
        guard.refresh()
    (nodes / "alice.key").chmod(0o600)
    assert guard.refresh()
    assert guard.credentials().certificate == pair.certificate
    pair = renewed(3.0)
    (nodes / "alice.pem").write_bytes(pair.certificate)  # as `kubectl cp` does, one by one
    with pytest.raises(TrustError, match="not the certificate's"):
        guard.refresh()
    (nodes / "alice.key").write_bytes(pair.key)
    assert guard.refresh()
    assert guard.credentials().certificate == pair.certificate
    assert not guard.refresh()


def test_a_list_of_another_user_is_not_called_damaged(run, monkeypatch):
    """`sudo deca-node swarm revoke` leaves one; it counts as soon as it is this user's."""
    keyring = run.keyring("alice")
    guard = Guard(keyring, "alice")
    keyring.keep_revoked({"eve": run.authority.revoke("eve")})
    opened = Path.open

    def refused(path, *arguments, **options):
        if path.name == "revoked.json":
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", refused)
        with pytest.raises(TrustError, match=r"cannot be read: Permission denied; .*chown"):
            guard.refresh()
    assert guard.refresh()  # chown changes no content and no mtime
    assert guard.revoked == {"eve"}


def test_a_change_of_owner_or_mode_is_seen(run):
    """Of the list, the certificate and the key."""
    keyring = run.keyring("alice")
    keyring.keep_revoked({"eve": run.authority.revoke("eve")})
    for name in ("revoked.json", "nodes/alice.pem", "nodes/alice.key"):
        before, path = keyring.stamp("alice"), keyring.folder / name
        ends = time.monotonic() + 5
        while keyring.stamp("alice") == before:  # the file system's clock ticks in milliseconds
            assert time.monotonic() < ends
            path.chmod(path.stat().st_mode ^ 0o040)


def test_only_who_is_due_is_renewed_and_only_by_the_authority(run):
    """The new certificate names who shows the old one, whatever the request says."""
    head = run.head()
    head.keep_node("head", run.keyring("head2").node("head2"))
    run.keyring("hub")
    Keyring(run.folder / "hub").keep_authority(run.authority)
    hub = Guard(Keyring(run.folder / "hub"), "hub")
    fresh = run.keyring("alice").node("alice")
    request = identity.new_request(identity.new_key())
    with pytest.raises(PeerRefused, match="last third"):
        hub.renew_for(fresh.certificate, request)
    due = run.keyring("bob", begins=-0.9 * 86400).node("bob")
    renewed = identity.read(hub.renew_for(due.certificate, request))
    assert renewed.holder == Holder("run", "bob", operator=False)
    assert renewed.ends > due.says.ends
    with pytest.raises(PeerRefused, match="within the last 60 s"):  # each costs a wait for the disk
        hub.renew_for(due.certificate, request)
    other = run.keyring("dora", begins=-0.9 * 86400).node("dora")
    with pytest.raises(PeerRefused, match="not a request"):
        hub.renew_for(other.certificate, b"nonsense")
    with pytest.raises(PeerRefused, match="not here"):
        run.guard("carol").renew_for(due.certificate, request)
    with pytest.raises(PeerRefused, match="only nodes"):
        hub.renew_for(head.operator().certificate, request)


def test_a_renewal_is_of_the_same_node_and_longer(run):
    """What a peer hands us instead is refused."""
    keyring = run.keyring("alice", begins=-0.9 * 86400)
    guard = Guard(keyring, "alice")
    assert guard.is_renewal_due
    for wrong in (run.keyring("bob").node("bob"), keyring.node("alice")):
        with pytest.raises(TrustError, match="not a renewal"):
            guard.renewed(wrong.key, wrong.certificate)
    key = identity.new_key()
    request = identity.new_request(key)
    longer = run.authority.issue(request, "alice", time.time(), 1)
    with pytest.raises(TrustError, match="not the certificate's"):
        guard.renewed(identity.new_key(), longer)
    with pytest.raises(TrustError, match="another authority"):
        other = Authority.new("run", time.time())
        guard.renewed(key, other.issue(request, "alice", time.time(), 1))
    guard.renewed(key, longer)
    assert not guard.is_renewal_due
    assert keyring.node("alice") == Pair(key, longer)


def test_a_visitor_shows_the_operators_certificate_or_a_nodes(run):
    """Whoever has neither is told what to copy."""
    head = run.head()
    assert Visitor(head).credentials().certificate == head.operator().certificate
    alice = run.keyring("alice")
    assert Visitor(alice).credentials().certificate == alice.node("alice").certificate
    with pytest.raises(TrustError, match=r"operator\.pem"):
        Visitor(Keyring.made(run.folder / "empty", run.authority.certificate))


def test_a_visitor_shows_what_is_still_valid(run):
    """On a desk without the authority's key nobody renews the operator's certificate."""
    keyring = run.keyring("alice")
    key = identity.new_key()
    request = identity.new_request(key)
    over = run.authority.issue_operator(request, time.time() - 2 * 86400, 1.0)
    keyring.keep_operator(Pair(key, over))
    assert Visitor(keyring).credentials().certificate == keyring.node("alice").certificate
    for path in (keyring.folder / "nodes").iterdir():
        path.unlink()
    with pytest.raises(TrustError, match="its certificate expired on "):
        Visitor(keyring)
    good = run.head()
    for name in ("alice.pem", "alice.key"):
        (good.folder / "nodes").mkdir(exist_ok=True)
        (good.folder / "nodes" / name).write_text("damaged")
    assert Visitor(good).credentials().certificate == good.operator().certificate


def test_a_damaged_certificate_is_replaced_by_a_new_one(run):
    """As the line that names it says: join the run anew."""
    keyring = run.keyring("alice")
    pair = keyring.node("alice")
    for damage in (b"x" * (MAX_CERTIFICATE_BYTES + 1), b"damaged"):
        (keyring.folder / "nodes" / "alice.pem").write_bytes(damage)
        with pytest.raises(TrustError):
            keyring.node("alice")
        keyring.keep_node("alice", pair)
        assert keyring.node("alice") == pair
