"""The trust folder: a run's authority, the certificates of this machine's nodes, their keys.

::

    authority.pem    the authority's certificate, by which all members know each other
    authority.key    only where the run was made: whoever has it can let anybody in
    issued/          a copy of each certificate that the authority here has issued
    nodes/NAME.pem, NAME.key    of a node of this machine
    operator.pem, operator.key  of a person who may control nodes
    revoked.json     who is out of the run, each with the authority's signature

Keys have mode 0600 in folders of mode 0700. All files are replaced in one piece.
"""

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import filelock

from deca_node import identity
from deca_node.disk import is_full, sync
from deca_node.errors import DiskFullError, TrustError
from deca_node.identity import Authority
from deca_node.limits import MAX_CERTIFICATE_BYTES, MAX_REVOKED, MAX_REVOKED_BYTES
from deca_node.trust import CLOCK_SECONDS, Certificate, is_name, objection

AUTHORITY, AUTHORITY_KEY = "authority.pem", "authority.key"
OPERATOR = "operator"
REVOKED = "revoked.json"
_NODES = "nodes"
_ISSUED = "issued"
# A key whose certificate is about to be written.
_KEY_BEFORE = ".key.new"
# A process that changes a pair or the list of those who are out holds it for milliseconds.
_LOCK, _LOCK_SECONDS = ".lock", 10.0

_FROM_INIT = "copy operator.pem and operator.key from where `deca-node swarm init` ran"
# What helps where a file is damaged.
_ANEW = "restore it, or join the run again"
_ISSUED_ANEW = "copy it from its node, or leave it: the node's next renewal replaces it"
_OPERATOR_ANEW = f"restore it, or {_FROM_INIT}"


@dataclass(frozen=True)
class Pair:
    """A private key and its certificate, PEM."""

    key: bytes
    certificate: bytes

    @property
    def says(self) -> Certificate:
        """What the certificate says."""
        return identity.read(self.certificate)


class Keyring:
    """A run's trust folder on this machine.

    Args:
        folder: where.
        authority: its certificate, PEM, of a folder that is just being made; else it is read.

    Attributes:
        authority: its certificate, PEM.
        run: the run's name.

    Raises:
        TrustError: there is none, or it is damaged.
    """

    def __init__(self, folder: Path, authority: bytes | None = None) -> None:
        self.folder = folder
        self.authority = authority or _read(
            folder / AUTHORITY,
            "create the run here (deca-node swarm init) or join it (deca-node swarm join TOKEN); "
            "on a network where every machine is trusted, trust.insecure = true needs none",
        )
        with _at(folder / AUTHORITY):
            self.run = identity.run_of(self.authority)

    @classmethod
    def of_run(cls, folder: Path, run: str) -> "Keyring":
        """The folder of a run that is known by its name.

        Raises:
            TrustError: there is none, or it is another run's.
        """
        keyring = cls(folder)
        if keyring.run != run:
            raise TrustError(
                f"{folder} belongs to run {keyring.run!r}, not {run!r}; set trust.folder or "
                "run.name"
            )
        return keyring

    @classmethod
    def made(cls, folder: Path, authority: bytes) -> "Keyring":
        """The folder of a run, made if need be.

        Raises:
            TrustError: it is another run's, or cannot be written.
        """
        path = folder / AUTHORITY
        if path.exists():
            keyring = cls(folder)
            if identity.fingerprint(keyring.authority) != identity.fingerprint(authority):
                raise TrustError(
                    f"{folder} belongs to another authority, of run {keyring.run!r}; give another "
                    "folder (--trust), or move this one away if that run has ended"
                )
            return keyring
        with _written(folder):
            _make_folder(folder)
            _write(path, authority)
        return cls(folder)

    # --- the authority

    @property
    def has_authority(self) -> bool:
        """Whether this machine can let others in."""
        return (self.folder / AUTHORITY_KEY).exists()

    def open_authority(self) -> Authority:
        """The authority with its key.

        Raises:
            TrustError: its key is elsewhere.
        """
        path = self.folder / AUTHORITY_KEY
        key = _read_key(path, "this works only on the machine where `deca-node swarm init` ran")
        return Authority(key, self.authority)

    def keep_authority(self, authority: Authority) -> None:
        """Keep a new authority's key here."""
        path = self.folder / AUTHORITY_KEY
        with _written(self.folder):
            _make_folder(self.folder)
            if path.exists():  # what is left of an `init` that was cut off; or all that is left
                path.replace(path.with_name(f"{path.name}.old"))
            _write(path, authority.key)

    def issued(self) -> list[str]:
        """The nodes that the authority here has issued certificates for, by name."""
        return _names(self.folder / _ISSUED)

    def issued_certificate(self, node: str) -> Certificate:
        """The newest certificate that the authority here has issued for a node.

        Raises:
            TrustError: it is damaged or cannot be read.
        """
        return _certificate(self.folder / _ISSUED / f"{node}.pem", _ISSUED_ANEW)

    def note_issued(self, node: str, certificate: bytes) -> None:
        """Keep a copy of what was issued."""
        with _written(self.folder):
            _make_folder(self.folder / _ISSUED)
            _write(self.folder / _ISSUED / f"{node}.pem", certificate)

    # --- this machine's own

    def nodes(self) -> list[str]:
        """The nodes that have a certificate here, by name."""
        return _names(self.folder / _NODES)

    def node_certificate(self, name: str) -> Certificate:
        """The certificate that a node has here, whatever its key is like.

        Raises:
            TrustError: it is damaged or cannot be read.
        """
        return _certificate(self.folder / _NODES / f"{name}.pem")

    def node(self, name: str) -> Pair:
        """A node's key and certificate.

        Raises:
            TrustError: it has none, they do not fit together, or others can read the key.
        """
        path = self.folder / _NODES / f"{name}.pem"
        return self._pair(
            path,
            f"node {name!r} of run {self.run!r} needs one: on the machine of the authority "
            f"`deca-node swarm invite`, here `deca-node swarm join TOKEN --node {name}`",
            _ANEW,
        )

    def keep_node(self, name: str, pair: Pair, *, wait: bool = True) -> None:
        """Keep a node's key and certificate.

        Args:
            name: of the node.
            pair: what is kept.
            wait: until other processes have done what they are at; else they are an error.

        Raises:
            TrustError: the folder cannot be written.
            DiskFullError: there is no room.
        """
        self._keep(self.folder / _NODES / f"{name}.pem", pair, wait=wait)

    @property
    def has_operator(self) -> bool:
        """Whether an operator's certificate is here."""
        return (self.folder / f"{OPERATOR}.pem").exists()

    def operator(self) -> Pair:
        """The operator's key and certificate.

        Raises:
            TrustError: as for ``node``.
        """
        return self._pair(
            self.folder / f"{OPERATOR}.pem",
            f"it is made by `deca-node swarm init`; {_FROM_INIT}",
            _OPERATOR_ANEW,
        )

    def operator_certificate(self) -> Certificate:
        """The operator's certificate, whatever its key is like.

        Raises:
            TrustError: it cannot be read.
        """
        return _certificate(self.folder / f"{OPERATOR}.pem", _OPERATOR_ANEW)

    def keep_operator(self, pair: Pair) -> None:
        """Keep an operator's key and certificate."""
        self._keep(self.folder / f"{OPERATOR}.pem", pair)

    def caller(self, now: float) -> Pair:
        """What a person's questions to nodes are asked with: the operator's, else a node's.

        Args:
            now: seconds since 1970. A pair that nodes accept then goes before one that they refuse.

        Raises:
            TrustError: there is none, or what is there cannot be read.
        """
        held = [self.operator] if self.has_operator else []
        held += [functools.partial(self.node, name) for name in self.nodes()]
        refused = None
        for read in held:
            pair = read()
            if not objection(pair.says, self.run, (), (), now):
                return pair
            refused = refused or pair
        if refused is None:
            raise TrustError(
                f"{self.folder} has no certificate to show to a node; join the run with "
                "`deca-node swarm join TOKEN`, or copy operator.pem and operator.key here"
            )
        return refused

    def _pair(self, path: Path, remedy: str, damaged: str) -> Pair:
        before = _states(path, *_keys(path))
        try:
            certificate = _read(path, remedy)
            key, new = _keys(path)
            if _fits(new, certificate):  # a replacement was cut off
                # Reading does without it, as where the folder cannot be written.
                with contextlib.suppress(TrustError, DiskFullError):
                    self._end_replacing(path)
                key = new if _fits(new, certificate) else key
            pair = Pair(_read_key(key, remedy), certificate)
            with _at(key, damaged):
                identity.check_key(pair.key)
            with _at(path, damaged):
                identity.check_pair(pair.key, pair.certificate, self.authority)
        except TrustError:
            if _states(path, *_keys(path)) == before:
                raise
            return self._pair(path, remedy, damaged)  # another process has replaced it meanwhile
        return pair

    def _keep(self, path: Path, pair: Pair, *, wait: bool = True) -> None:
        with _written(path):
            _make_folder(path.parent)
            with self._alone(wait=wait):
                with contextlib.suppress(TrustError):  # of a damaged certificate no key is kept
                    _rename_key(path)  # what an earlier replacement left half done
                # Whenever this is cut off, the certificate's key is there: see _pair.
                _write(_keys(path)[1], pair.key)
                _write(path, pair.certificate)
                _rename_key(path)

    def _end_replacing(self, path: Path) -> None:
        # A running node comes here on its event loop; another process may as well end it.
        with _written(path), self._alone(wait=False):
            _rename_key(path)

    @contextlib.contextmanager
    def _alone(self, *, wait: bool = True) -> Iterator[None]:
        """No other process changes this folder meanwhile.

        Args:
            wait: for another one to be done.

        Raises:
            TrustError: another one holds it, for too long if it was waited for.
            OSError: the folder cannot be written.
        """
        lock = self.folder / _LOCK
        try:
            with filelock.FileLock(lock, timeout=_LOCK_SECONDS * wait, mode=0o600):
                yield
        except filelock.Timeout:
            raise TrustError(f"{lock}: another process holds it; try again") from None

    # --- who is out

    def revoked(self) -> dict[str, bytes]:
        """Nodes that are out, with the authority's signatures.

        Raises:
            TrustError: the list is damaged or cannot be read; without it nobody could be trusted.
        """
        path = self.folder / REVOKED
        try:
            with path.open("rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                text = file.read(MAX_REVOKED_BYTES + 1)
            if wrong := _changeable(path, mode):
                raise TrustError(wrong)
            found = {node: bytes.fromhex(mark) for node, mark in json.loads(text).items()}
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise _unreadable(path, error) from None
        except (ValueError, AttributeError, TypeError):
            found = {"": b""}
        if len(found) > MAX_REVOKED or not all(
            is_name(node) and identity.revokes(self.authority, node, mark)
            for node, mark in found.items()
        ):
            raise TrustError(f"{path}: damaged; copy it from another member, all have it")
        return found

    def keep_revoked(self, revoked: Mapping[str, bytes], *, wait: bool = True) -> dict[str, bytes]:
        """Add to those who are out; other processes may do so at the same time.

        Args:
            revoked: nodes, with the authority's signatures.
            wait: as for ``keep_node``.

        Returns:
            All that are out now.

        Raises:
            TrustError: the list is damaged, or cannot be written.
            DiskFullError: there is no room for it.
        """
        with _written(self.folder):
            _make_folder(self.folder)
            with self._alone(wait=wait):
                now = {**self.revoked(), **revoked}
                if len(now) > MAX_REVOKED:  # a longer list would be refused when read again
                    raise TrustError(f"more than {MAX_REVOKED} nodes are revoked")
                text = json.dumps({n: mark.hex() for n, mark in sorted(now.items())}, indent=1)
                _write(self.folder / REVOKED, text.encode())
        return now

    def readable_by_others(self) -> list[str]:
        """Keys that others can read, in words with a remedy each; their group, too."""
        keys = [
            path
            for folder in (self.folder, self.folder / _NODES)
            for ending in (".key", _KEY_BEFORE)
            for path in folder.glob(f"*{ending}")
        ]
        found = (loose(path, path.stat().st_mode, strict=True) for path in sorted(keys))
        return [wrong for wrong in found if wrong]

    def stamp(self, node: str) -> tuple[int, ...]:
        """Changes when another process has changed what a running node uses, or who may read it."""
        path = self.folder / _NODES / f"{node}.pem"
        return _states(self.folder / REVOKED, path, *_keys(path))

    def issue(
        self, node: str, request: bytes, now: float, days: float, *, fresh: bool = False
    ) -> bytes:
        """A node's certificate from the authority here, noted as issued.

        Args:
            node: whom it will name.
            request: for a certificate.
            now: seconds since 1970.
            days: that it is good for.
            fresh: whether the name must be nobody's yet, whoever else issues at the same time.

        Raises:
            TrustError: the request is none, or the name is taken.
        """
        authority = self.open_authority()
        with _written(self.folder), self._alone():
            if fresh and node in self.issued():
                raise TrustError(
                    f"there already is a node {node!r}; join under another name (--node), or have "
                    f"it invited anew: deca-node swarm invite --node {node}"
                )
            certificate = authority.issue(request, node, now, days)
            self.note_issued(node, certificate)
        return certificate

    def issue_operator(self, now: float, days: float) -> None:
        """Give the operator a new key and certificate, from the authority here."""
        key = identity.new_key()
        request = identity.new_request(key)
        self.keep_operator(Pair(key, self.open_authority().issue_operator(request, now, days)))


def lifetime_days(shown: Certificate) -> float:
    """How long a certificate was made for; it begins earlier than it was made."""
    return (shown.ends - shown.begins - CLOCK_SECONDS) / 86400


def loose(path: Path, mode: int, *, strict: bool = False) -> str:
    """What is wrong with a key file's permissions, in words; empty when all is well.

    Args:
        path: of the file.
        mode: of the file.
        strict: whether a group that can read it is worth a word, too.
    """
    if mode & 0o037:  # a group may read it: that is how orchestrators hand secrets to a daemon
        return f"{path}: others can read or change this key; chmod 600 {path}"
    if strict and mode & 0o040 and mode & 0o200:  # a secret's owner cannot write it either
        return f"{path}: its group can read this key; chmod 600 {path}"
    return ""


def _changeable(path: Path, mode: int) -> str:
    """The same of a file that anybody may read: who changes it says whom a node believes."""
    return f"{path}: others can change this file; chmod go-w {path}" if mode & 0o022 else ""


def _keys(path: Path) -> tuple[Path, Path]:
    """A certificate's key; where it is while the pair is being replaced."""
    return path.with_suffix(".key"), path.with_suffix(_KEY_BEFORE)


def _fits(key: Path, certificate: bytes) -> bool:
    """Whether a key is there and is the certificate's."""
    with contextlib.suppress(TrustError):
        return identity.fits(_read(key, "", None), certificate)
    return False  # there is none, or a damaged one: the other key is looked at as it is


def _rename_key(path: Path) -> None:
    """Where a new certificate is there already, its key takes the old one's place."""
    key, new = _keys(path)
    # Else the certificate is the old one still, and so is the key beside it.
    if path.exists() and _fits(new, _read(path, "")):
        new.replace(key)
        sync(path.parent)


def _states(*paths: Path) -> tuple[int, ...]:
    """Changes when a file is replaced."""
    found = []
    for path in paths:
        with contextlib.suppress(OSError):
            state = path.stat()
            # Two replacements within a tick of the file system's clock differ in the file; of
            # another owner or mode, ctime alone tells.
            found += [state.st_mtime_ns, state.st_ctime_ns, state.st_ino]
    return tuple(found)


def _names(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.pem") if is_name(path.stem))


def _certificate(path: Path, damaged: str = _ANEW) -> Certificate:
    with _at(path, damaged):
        return identity.read(_read(path, ""))


@contextlib.contextmanager
def _at(path: Path, damaged: str = _ANEW) -> Iterator[None]:
    """Name the file in which something is wrong, and what helps."""
    try:
        yield
    except TrustError as error:
        raise TrustError(f"{path}: {error}; {damaged}") from None


def _read(path: Path, remedy: str, check: Callable[[Path, int], str] | None = _changeable) -> bytes:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(MAX_CERTIFICATE_BYTES + 1)
    except FileNotFoundError:
        raise TrustError(f"{path}: no such file; {remedy}") from None
    except OSError as error:
        raise _unreadable(path, error) from None
    if check is not None and (wrong := check(path, mode)):
        raise TrustError(wrong)
    if len(content) > MAX_CERTIFICATE_BYTES:
        raise TrustError(f"{path}: too long for a key or a certificate")
    return content


def _unreadable(path: Path, error: OSError) -> TrustError:
    mine = isinstance(error, PermissionError)
    remedy = "; the user who runs the node must own it (chown)" if mine else ""
    return TrustError(f"{path}: cannot be read: {error.strerror or error}{remedy}")


def _read_key(path: Path, remedy: str) -> bytes:
    return _read(path, remedy, loose)


@contextlib.contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise DiskFullError(f"{path}: no space left on the disk") from None
        raise TrustError(f"{path}: cannot be written: {error.strerror or error}") from None


def _make_folder(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def _write(path: Path, content: bytes) -> None:
    """Replace a file in one piece; nobody else can read it at any moment."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o600)
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)
