"""Agreeing on a visit's edges: an offer from each end to the other, then each end's degree.

What is agreed is membership.VisitAgreement's to decide; here are its calls, and the waiting.
"""

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from deca_node.compression import Format
from deca_node.config import Timing
from deca_node.errors import PeerError, PeerRefused, PeerTimeout
from deca_node.exchange.neighbourhood import Neighbourhood, is_out
from deca_node.membership import Edges, Verdict, VisitAgreement
from deca_node.patience import RETRY_SECONDS, to_come
from deca_node.pb import node_pb2 as pb
from deca_node.waiting import Pulse

# A peer's answers that count; after any other the offer is made again.
FINAL = frozenset[int]({Verdict.ACCEPTED, Verdict.PASSED, Verdict.NOT_WANTED})


class Handshake:
    """See the module; its arguments are Exchange's, and what all parts have in common."""

    def __init__(
        self, peers: Neighbourhood, timing: Timing, stopping: asyncio.Event, changes: Pulse
    ) -> None:
        self._peers, self._timing = peers, timing
        self._stopping, self._changes = stopping, changes
        self._agreement = VisitAgreement(0)
        self._untold: set[str] = set()  # neighbours that do not know our degree yet
        self._idle: set[str] = set()  # let the last visit's beginning wait in vain

    async def open(
        self, visit: int, step: int, wanted: frozenset[str], graph: int, wish: Format | None
    ) -> Edges:
        """Agree with the wanted neighbours; this node begins the visit at ``step`` of it."""
        agreement = self._agreement
        agreement.begin(visit, wanted, step, wish)
        self._changes.beat()
        wire = pb.WireFormat.Name(wish or Format.FP32)
        offer = pb.VisitOffer(sender=self._peers.sender(), visit=visit, step=step, wire_format=wire)
        await self._meet(wanted, partial(self._offer, offer), agreement.undecided)
        linked = agreement.close()
        self._changes.beat()
        # Ours must arrive as well as theirs.
        untold = self._untold = set(linked)
        degree = pb.VisitDegree(
            sender=self._peers.sender(), visit=visit, degree=len(linked), graph=graph
        )
        await self._meet(
            linked, partial(self._tell, degree), lambda: agreement.unsettled() | untold
        )
        edges = agreement.settle()
        self._idle -= edges.weights.keys()
        return edges

    async def _meet(
        self,
        peers: frozenset[str],
        call: Callable[[str], Coroutine[Any, Any, None]],
        open_: Callable[[], frozenset[str]],
    ) -> None:
        loop = asyncio.get_running_loop()
        begin = loop.time()
        calls = [asyncio.create_task(call(peer)) for peer in sorted(peers)]
        try:
            while not self._stopping.is_set():
                elapsed = loop.time() - begin
                patience = {peer: self._patience(peer) - elapsed for peer in open_()}
                for peer, left in patience.items():
                    if left <= 0 and peer not in self._idle:
                        self._idle.add(peer)
                        if not is_out(self._peers, peer):
                            self._peers.trouble(peer, PeerTimeout("did not come to the visit"))
                waiting = [left for left in patience.values() if left > 0]
                if not waiting:
                    break
                await self._changes.comes(min(*waiting, self._timing.heartbeat))
        finally:
            for task in calls:
                task.cancel()
            await asyncio.gather(*calls, return_exceptions=True)

    def _patience(self, peer: str) -> float:
        if is_out(self._peers, peer):
            return 0.0
        return to_come(
            self._timing,
            idle=peer in self._idle,
            suspect=self._peers.is_suspect(peer),
            down=self._peers.is_down(peer),
        )

    async def _offer(self, request: pb.VisitOffer, peer: str) -> None:
        while (link := self._peers.link(peer)) is not None:
            pause = self._timing.heartbeat
            try:
                answer = await link.open_visit(request, self._timing.rpc)
            except PeerError as error:
                pause = self._failed(peer, error)
            else:
                self._peers.seen(peer)
                if answer.verdict in FINAL:
                    self._agreement.answered(peer, Verdict(answer.verdict))
                self._changes.beat()
                # A peer that accepted before it reached the visit may, once there, see
                # other members and decline: ask again while its own offer is missing.
                if peer not in self._agreement.undecided():
                    return
            await asyncio.sleep(pause)

    async def _tell(self, request: pb.VisitDegree, peer: str) -> None:
        while (link := self._peers.link(peer)) is not None:
            try:
                await link.settle_visit(request, self._timing.rpc)
            except PeerError as error:
                await asyncio.sleep(self._failed(peer, error))
            else:
                self._untold.discard(peer)
                self._changes.beat()
                return

    def _failed(self, peer: str, error: PeerError) -> float:
        """A call failed and is made again; seconds until then."""
        self._peers.trouble(peer, error)
        self._peers.retried(peer)
        return self._timing.heartbeat if isinstance(error, PeerRefused) else RETRY_SECONDS

    def answer_offer(self, request: pb.VisitOffer, *, resting: bool) -> pb.VisitAnswer:
        """A neighbour offers an edge; who rests wants none."""
        peer = self._peers.check_sender(request.sender)
        self._peers.seen(peer)
        try:
            wish = Format(request.wire_format)
        except ValueError:
            raise PeerRefused("bad_format", f"no format {request.wire_format}") from None
        verdict = Verdict.NOT_WANTED
        if not resting:
            self._agreement.make_room(self._is_gone)
            verdict = self._agreement.offered(
                peer, request.visit, request.sender.session, request.step, wish
            )
        self._changes.beat()
        return self._answer(verdict)

    def answer_degree(self, request: pb.VisitDegree) -> pb.VisitAnswer:
        """A neighbour tells its degree."""
        peer = self._peers.check_sender(request.sender)
        if request.degree < 1:
            raise PeerRefused("bad_degree", "a neighbour has at least one edge")
        self._agreement.make_room(self._is_gone)
        self._agreement.degree(peer, request.visit, request.degree, request.graph)
        self._changes.beat()
        return self._answer(Verdict.ACCEPTED)

    def _is_gone(self, peer: str) -> bool:
        return self._peers.link(peer) is None

    def _answer(self, verdict: Verdict) -> pb.VisitAnswer:
        name = pb.VisitAnswer.Verdict.Name(verdict)
        agreement = self._agreement
        return pb.VisitAnswer(verdict=name, visit=agreement.visit, closed=agreement.closed)

    @property
    def overtaken(self) -> bool:
        """Whether the visit has no edge because the neighbours had begun it without us."""
        return self._agreement.overtaken

    def is_closed(self, visit: int) -> bool:
        """Whether the visit's edges are fixed: who comes now is too late for it."""
        return self._agreement.visit == visit and self._agreement.closed
