"""How nodes reach each other: the interface. Its implementation over gRPC is in the files here.

They alone import grpc. Its exceptions become PeerErrors there, and ours status codes.
"""

import os
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from deca_node.pb import node_pb2 as pb

# Read once, when gRPC is loaded, which these files do after this one. It has no setting for the
# least version of TLS, but one for the ciphers of TLS 1.2, and this one needs an RSA certificate,
# of which a run has none: what is left is TLS 1.3.
os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-RSA-AES128-GCM-SHA256"
# Its own lines about handshakes and headers that are wrong, with which a caller could fill a disk;
# what they mean for the run is in our own log.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")


@dataclass(frozen=True)
class Caller:
    """Who makes a call, as far as the connection proves it.

    Attributes:
        node: the node that the caller's certificate names; None in plain text, and for operators.
        operator: it showed an operator's certificate of this run.
        local: it came through this machine's own socket file, which its owner alone can open.
    """

    node: str | None = None
    operator: bool = False
    local: bool = False


class Handler(Protocol):
    """What a node answers its peers. A PeerRefused raised here reaches the caller as one."""

    async def hello(self, request: pb.HelloRequest, source: str) -> pb.HelloReply:
        """Answer a greeting; ``source`` is the caller's IP address."""
        ...

    async def open_visit(self, request: pb.VisitOffer) -> pb.VisitAnswer:
        """Take an edge's offer."""
        ...

    async def settle_visit(self, request: pb.VisitDegree) -> pb.VisitAnswer:
        """Take a neighbour's degree."""
        ...

    def pull(self, request: pb.PullRequest) -> AsyncGenerator[bytes]:
        """Yield the messages of a published block, waiting for it first.

        A reader that does not take one in time is thrown into it as PeerRefused ``too_slow``.
        """
        ...

    async def list_blocks(self, request: pb.ListBlocksRequest) -> pb.BlockList:
        """Tell which blocks are kept here, in which version."""
        ...

    def fetch_block(self, request: pb.FetchBlockRequest) -> AsyncGenerator[bytes]:
        """Yield the messages of a kept block's file."""
        ...

    async def goodbye(self, request: pb.GoodbyeRequest) -> pb.GoodbyeReply:
        """Note that the sender leaves."""
        ...


class StatusHandler(Protocol):
    """What a node answers people and scripts."""

    async def get_status(self) -> pb.NodeStatus:
        """The status now."""
        ...

    def watch_status(self, interval: float) -> AsyncGenerator[pb.NodeStatus]:
        """The status now and every ``interval`` seconds until the run ends."""
        ...

    async def get_history(self, request: pb.GetHistoryRequest) -> pb.HistoryReply:
        """The steps made so far, thinned."""
        ...


class ControlHandler(Protocol):
    """What a node answers its operator. A PeerRefused raised here reaches the caller as one."""

    async def pause(self, request: pb.PauseRequest) -> pb.PauseReply:
        """Take no part after the step under way."""
        ...

    async def resume(self, request: pb.ResumeRequest) -> pb.ResumeReply:
        """Take part again."""
        ...

    async def checkpoint(self, request: pb.CheckpointRequest) -> pb.CheckpointReply:
        """Save between two steps."""
        ...

    async def stop(self, request: pb.StopRequest) -> pb.StopReply:
        """End as after SIGTERM."""
        ...

    async def export(self, request: pb.ExportRequest) -> pb.ExportReply:
        """Write the model as last saved."""
        ...


class Link(Protocol):
    """Calls to one peer. All raise PeerUnavailable, PeerTimeout or PeerRefused."""

    async def hello(self, request: pb.HelloRequest, timeout: float) -> pb.HelloReply:
        """Greet."""
        ...

    async def open_visit(self, request: pb.VisitOffer, timeout: float) -> pb.VisitAnswer:
        """Offer an edge."""
        ...

    async def settle_visit(self, request: pb.VisitDegree, timeout: float) -> pb.VisitAnswer:
        """Tell the degree."""
        ...

    def pull(self, request: pb.PullRequest, timeout: float) -> AsyncGenerator[bytes]:
        """Receive a block's messages; ends early when the iterator is closed."""
        ...

    async def list_blocks(self, request: pb.ListBlocksRequest, timeout: float) -> pb.BlockList:
        """Ask which blocks the peer keeps."""
        ...

    def fetch_block(self, request: pb.FetchBlockRequest, timeout: float) -> AsyncGenerator[bytes]:
        """Receive a kept block's file; ends early when the iterator is closed."""
        ...

    async def goodbye(self, request: pb.GoodbyeRequest, timeout: float) -> pb.GoodbyeReply:
        """Take leave."""
        ...

    async def renew(self, request: bytes, timeout: float) -> bytes:
        """Ask for a new certificate of this node; only who has the authority's key gives one."""
        ...

    async def close(self) -> None:
        """Give up the connection."""
        ...


class Transport(Protocol):
    """A way to be reached and to reach."""

    async def listen(
        self,
        handler: Handler,
        status: StatusHandler | None,
        control: ControlHandler | None = None,
        socket: Path | None = None,
    ) -> int:
        """Start answering; returns the port. Raises ListenError.

        Args:
            handler: answers peers.
            status: answers people.
            control: answers operators, where the transport can tell them from others.
            socket: a file to listen on as well, for tools of the same user on this machine; where
                that fails it is not there afterwards.
        """
        ...

    def link(self, address: str) -> Link:
        """A link to HOST:PORT; nothing is sent before the first call."""
        ...

    async def close(self, grace: float) -> None:
        """Stop answering; calls under way have ``grace`` seconds to end."""
        ...
