"""What the exchange needs to know of peers."""

from typing import Protocol

from deca_node.errors import PeerError
from deca_node.pb import node_pb2 as pb
from deca_node.transport import Link


class Neighbourhood(Protocol):
    """Peers, as the exchange asks and tells of them; swarm.Swarm is one."""

    def sender(self) -> pb.Sender:
        """This node's introduction."""
        ...

    def link(self, peer: str) -> Link | None:
        """A link to a peer of the run, None when it is not known or gone."""
        ...

    def is_suspect(self, peer: str) -> bool:
        """Whether the peer failed lately."""
        ...

    def is_down(self, peer: str) -> bool:
        """Whether its connection broke or nobody listens there."""
        ...

    def is_paused(self, peer: str) -> bool:
        """Whether the peer has said that it takes no part for now."""
        ...

    def trouble(self, peer: str, error: PeerError) -> None:
        """A call to the peer failed or what it sent was refused."""
        ...

    def seen(self, peer: str) -> None:
        """The peer showed that it lives."""
        ...

    def sent(self, peer: str, nbytes: int) -> None:
        """Bytes of blocks went to the peer."""
        ...

    def received(self, peer: str, nbytes: int) -> None:
        """Bytes of blocks came from the peer."""
        ...

    def waited(self, peer: str, seconds: float) -> None:
        """A step waited for the peer's block."""
        ...

    def retried(self, peer: str) -> None:
        """A call to the peer failed and is made again."""
        ...

    def check_sender(self, sender: pb.Sender) -> str:
        """Name of a greeted peer of this run, current session. Raises PeerRefused."""
        ...


def is_out(peers: Neighbourhood, peer: str) -> bool:
    """Whether the peer is gone or takes no part for now: it will not come."""
    return peers.link(peer) is None or peers.is_paused(peer)
