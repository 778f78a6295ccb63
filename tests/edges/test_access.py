"""What a person's verb shows to a node."""

import base64
import contextlib
import time

import pytest

from deca_node import access, identity, registry
from deca_node.errors import TrustError, UnreachableError
from deca_node.keyring import Keyring
from tests.edges.test_registry import _own_folder  # noqa: F401 - nodes of this machine stay out
from tests.trust import Run

ELSEWHERE = "192.0.2.7:7430"


async def test_other_nodes_are_asked_with_the_folder_that_a_node_here_uses(tmp_path, monkeypatch):
    """As in a container, where trust.folder is not the default and nobody types --trust."""
    run = Run(tmp_path / "run", "swarm")
    keyring, other = run.keyring("here"), run.keyring("other")
    lines = other.caller(time.time()).certificate.decode().splitlines()
    shown = base64.b64decode("".join(line for line in lines if "-----" not in line))

    async def certificate(address):
        assert address == ELSEWHERE
        return shown

    monkeypatch.setattr(access, "_certificate", certificate)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    with registry.announce("127.0.0.1:7430", "swarm", "here", str(keyring.folder)):
        assert list(await access.credentials([ELSEWHERE])) == [ELSEWHERE]
    head = run.head()
    folders = (keyring.folder, tmp_path / "removed", head.folder, other.folder)
    asked = []
    with contextlib.ExitStack() as nodes, monkeypatch.context() as patch:
        patch.setattr(access, "Keyring", lambda folder: asked.append(folder) or Keyring(folder))
        for port, folder in enumerate(folders):
            nodes.enter_context(
                registry.announce(f"127.0.0.1:{port}", "swarm", f"n{port}", str(folder))
            )
        assert list(await access.credentials([ELSEWHERE])) == [ELSEWHERE]
    assert asked[-1] == head.folder  # the operator's before others
    with (
        registry.announce("127.0.0.1:7430", "swarm", "plain"),
        registry.announce("127.0.0.1:7431", "another-run", "here", str(keyring.folder)),
        pytest.raises(TrustError, match="give its trust folder with --trust"),
    ):
        await access.credentials([ELSEWHERE])


@pytest.mark.parametrize("address", ["a..b:80", f"{'a' * 64}.b:80", "ünï:80", "no address"])
async def test_what_cannot_be_called_is_nobody(address):
    """Whatever the resolver says of such a name, and whoever named it."""
    assert await access._certificate(address) is None


async def test_an_odd_certificate_is_another_program(monkeypatch):
    """The library has errors of its own for what a stranger can put into one."""

    async def certificate(address):
        return b"what"

    def read(_):
        raise LookupError("an extension twice")

    monkeypatch.setattr(identity, "to_pem", lambda shown: shown)

    monkeypatch.setattr(access, "_certificate", certificate)
    monkeypatch.setattr(identity, "read", read)
    with pytest.raises(UnreachableError, match="but not as a deca-node"):
        await access.credentials([ELSEWHERE])
