"""Trust folders for tests: an authority, its members, and what they can be given wrong."""

import time
from dataclasses import dataclass, field
from pathlib import Path

from deca_node import identity
from deca_node.guard import Guard
from deca_node.identity import Authority
from deca_node.keyring import Keyring, Pair


@dataclass
class Run:
    """A run's authority and the folders of its members under one folder."""

    folder: Path
    name: str = "run"
    authority: Authority = field(init=False)

    def __post_init__(self):
        self.authority = Authority.new(self.name, time.time())

    def keyring(self, node, *, begins=0.0, days=1.0):
        """A member's trust folder; ``begins`` is in seconds from now."""
        keyring = Keyring.made(self.folder / node, self.authority.certificate)
        key = identity.new_key()
        request = identity.new_request(key)
        certificate = self.authority.issue(request, node, time.time() + begins, days)
        keyring.keep_node(node, Pair(key, certificate))
        return keyring

    def head(self):
        """The folder with the authority's key and the operator's certificate."""
        keyring = Keyring.made(self.folder / "head", self.authority.certificate)
        keyring.keep_authority(self.authority)
        key = identity.new_key()
        shown = self.authority.issue_operator(identity.new_request(key), time.time(), 1.0)
        keyring.keep_operator(Pair(key, shown))
        return keyring

    def guard(self, node, **options):
        """A running member's trust."""
        return Guard(self.keyring(node), node, **options)
