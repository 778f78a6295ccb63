"""What a node answers peers and people, from its first moment on.

It is the transport's Handler and StatusHandler. Before the node has read its model there is no
member of the run to answer for it.
"""

import asyncio
import time
from collections.abc import AsyncGenerator

from deca_node.errors import PeerRefused
from deca_node.lookout import Lookout
from deca_node.member import Member
from deca_node.pb import node_pb2 as pb
from deca_node.standing import Standing
from deca_node.waiting import happens

WATCH_INTERVAL_SECONDS = (0.1, 3600.0)


class Reception:
    """See the module.

    Args:
        standing: where the node stands.
        lookout: what it finds wrong.
        stopping: set when the node ends.

    Attributes:
        member: None until the node has one.
    """

    def __init__(self, standing: Standing, lookout: Lookout, stopping: asyncio.Event) -> None:
        self._standing, self._lookout, self._stopping = standing, lookout, stopping
        self._made: tuple[float, pb.NodeStatus] | None = None  # for watchers, and when
        self.member: Member | None = None

    # --- peers

    def _met(self) -> Member:
        if self.member is None:
            raise PeerRefused("starting", "this node is loading its model")
        return self.member

    async def hello(self, request: pb.HelloRequest, source: str) -> pb.HelloReply:
        """See Handler."""
        return await self._met().hello(request, source)

    async def open_visit(self, request: pb.VisitOffer) -> pb.VisitAnswer:
        """See Handler."""
        return await self._met().open_visit(request)

    async def settle_visit(self, request: pb.VisitDegree) -> pb.VisitAnswer:
        """See Handler."""
        return await self._met().settle_visit(request)

    def pull(self, request: pb.PullRequest) -> AsyncGenerator[bytes]:
        """See Handler."""
        return self._met().pull(request)

    async def list_blocks(self, request: pb.ListBlocksRequest) -> pb.BlockList:
        """See Handler."""
        return await self._met().list_blocks(request)

    def fetch_block(self, request: pb.FetchBlockRequest) -> AsyncGenerator[bytes]:
        """See Handler."""
        return self._met().fetch_block(request)

    async def goodbye(self, request: pb.GoodbyeRequest) -> pb.GoodbyeReply:
        """See Handler."""
        return await self._met().goodbye(request)

    # --- people

    async def get_status(self) -> pb.NodeStatus:
        """See StatusHandler."""
        return self.status()

    async def watch_status(self, interval: float) -> AsyncGenerator[pb.NodeStatus]:
        """See StatusHandler."""
        low, high = WATCH_INTERVAL_SECONDS
        pause = min(max(interval if interval > 0 else 1.0, low), high)
        while not self._stopping.is_set():
            yield self._shared()
            await happens(self._stopping, pause)

    def _shared(self) -> pb.NodeStatus:
        """The status that all watchers get who ask at about the same time."""
        now = time.monotonic()
        if self._made is None or now - self._made[0] >= WATCH_INTERVAL_SECONDS[0] / 2:
            self._made = now, self.status()
        return self._made[1]

    async def get_history(self, request: pb.GetHistoryRequest) -> pb.HistoryReply:
        """See StatusHandler."""
        return self._standing.history(request)

    def status(self) -> pb.NodeStatus:
        """Everything there is to know about the node now."""
        return self._standing.status(self.member, self._lookout.findings)
