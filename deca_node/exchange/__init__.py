"""Exchanging blocks with neighbours: the interface. Its parts are in the files here.

None knows another's state: agreeing on a visit's edges (handshake.py), serving this node's
snapshots (serving.py), gathering the neighbours' blocks (gathering.py). Whom the last two wait for
and how long is decided, for both of them, in patience.py.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from deca_node.compression import Format
from deca_node.config import Timing
from deca_node.exchange.gathering import Gathered, Gathering, Hear, Mix, Sink, Step
from deca_node.exchange.handshake import Handshake
from deca_node.exchange.neighbourhood import Neighbourhood
from deca_node.exchange.serving import Serving, send_rates
from deca_node.membership import Edges
from deca_node.pacing import SendRates
from deca_node.patience import Patience
from deca_node.pb import node_pb2 as pb
from deca_node.references import OwnReferences
from deca_node.waiting import Pulse
from deca_node.wire import Layout, Snapshot

__all__ = ["Exchange", "Gathered", "Hear", "Mix", "Neighbourhood", "Sink", "send_rates"]


class Exchange:
    """One per node: what its steps and its neighbours ask of it.

    Args:
        peers: the neighbourhood.
        timing: deadlines.
        run: the run's name.
        stopping: set when the node is told to end; nothing is waited for any more.
        rates: what may be sent; all that the link takes when not given.
    """

    def __init__(
        self,
        peers: Neighbourhood,
        timing: Timing,
        run: str,
        stopping: asyncio.Event,
        rates: SendRates | None = None,
    ) -> None:
        self._peers, self._run = peers, run
        self._references = OwnReferences()
        # In common: a change (an offer, a peer's state, the stop signal), and whom to wait for.
        self._changes = changes = Pulse()
        self._patience = patience = Patience(timing, peers.is_suspect)
        self._handshake = Handshake(peers, timing, stopping, changes)
        self._serving = serving = Serving(
            peers, timing, stopping, rates or send_rates(), patience, changes
        )
        self._gathering = Gathering(peers, timing, run, stopping, patience, changes, serving.grown)

    # --- what the node asks for as it trains

    async def open_visit(
        self,
        visit: int,
        steps_per_visit: int,
        wanted: frozenset[str],
        first_serial: int,
        graph: int = 0,
        wish: Format | None = None,
    ) -> Edges:
        """Shake hands with the wanted neighbours and fix the visit's edges and weights.

        Waits at most ``visit_deadline`` for the neighbours to come, and as long for their degrees,
        since they may be waiting for others first. A peer that let us wait in vain in the last
        visit is given one call's timeout in this one. ``graph`` is told to the neighbours: a
        digest of the graph that this node sees, where that matters; and so is ``wish``, the format
        that this node would have; None takes fp32 for all edges, whatever the neighbours wish.
        """
        self._forget_references()
        self._patience.begin_visit()
        self._serving.begin_visit(visit, steps_per_visit, first_serial)
        step = first_serial - visit * steps_per_visit
        edges = await self._handshake.open(visit, step, wanted, graph, wish)
        self._serving.settle(edges)
        return edges

    async def make_room(self, *, patient: bool = False) -> float:
        """Let the last step's snapshot go, once the neighbours have it; seconds waited.

        They are waited for out of the same budget as their blocks are, unless ``patient``.
        """
        return await self._serving.make_room(patient=patient)

    def publish(self, snapshot: Snapshot) -> None:
        """Hand out a step's block from now on, and the one before no more."""
        self._serving.publish(snapshot)

    async def drain(self) -> frozenset[str]:
        """Serve the last block until every neighbour has it, at most ``step_deadline``.

        Returns:
            The neighbours that did not fetch it.
        """
        return await self._serving.drain()

    def rest(self) -> None:
        """Take no part in further steps, until ``wake_up`` or the next visit.

        Whoever asks for one hears so at once; what is published is handed out still.
        """
        self._serving.rest()

    def wake_up(self) -> bool:
        """Go on with the visit, unless a neighbour has gone on in it meanwhile.

        Returns:
            Whether one has; then this node stays out of the visit.
        """
        return self._serving.wake_up()

    def wake(self) -> None:
        """Something has changed elsewhere, as a peer's state: whoever waits here looks again."""
        self._changes.beat()

    def changed(self) -> Coroutine[Any, Any, Literal[True]]:
        """Returns at the next change after this call, even where it is awaited later."""
        return self._changes.wait()

    @property
    def edges(self) -> Edges:
        """Those of the visit."""
        return self._serving.edges

    @property
    def early(self) -> bool:
        """Whether all edges take a snapshot that is still being made.

        A compressed stream begins with scales, or is of a difference: these need all values.
        """
        return not self.edges.formats

    @property
    def overtaken(self) -> bool:
        """Whether the visit has no edge because the neighbours had begun it without us."""
        return self._handshake.overtaken

    @property
    def bytes_sent(self) -> int:
        """Bytes of blocks sent to all peers."""
        return self._serving.bytes_sent

    def give_up(self, peers: Collection[str]) -> None:
        """Use the edges to these neighbours no more in this visit: neither take nor serve."""
        weights = {peer: w for peer, w in self.edges.weights.items() if peer not in peers}
        self._serving.settle(replace(self.edges, weights=weights))

    def encode(self, snapshot: Snapshot, layout: Layout) -> None:
        """Add what neighbours on compressed edges get; may run on another thread.

        Once for each step's snapshot, before it is published.
        """
        formats = frozenset(self.edges.formats.values())
        self._references.encode(snapshot, layout, formats, self._run, self._peers.sender().node)

    async def gather(
        self,
        serial: int,
        layout: Layout,
        intake: Callable[[str], Mix] | None = None,
        hear: Hear | None = None,
        busy: "asyncio.Future[Any] | None" = None,
    ) -> Gathered:
        """Pull the step's block from every neighbour and mix what passes its checks.

        Either ``intake`` says for each neighbour where its values go, or blocks must come with
        notes and ``hear`` says it when it has heard the note.

        ``busy`` is what the caller does meanwhile: until it is done nobody waits, so it costs no
        neighbour its budget, and the deadline has not begun.

        Returns when all came, or those that came lately are through and the others failed, at
        latest ``step_deadline`` after ``busy`` is done.
        """
        serving = self._serving
        behind = partial(serving.is_behind, serial=serial)
        step = Step(serial, layout, serving.edges, serving.held, serving.encoded, hear, behind)
        gathered = await self._gathering.gather(step, intake, busy)
        sent = serving.end_step(gathered.used)
        for peer, edge in gathered.edges.items():
            edge.sent = sent[peer]
        if serving.is_last(serial):
            self._forget_references()
        return gathered

    def release(self) -> None:
        """Nothing is served any more; readers under way end."""
        self._forget_references()
        self._serving.release()

    # --- what neighbours ask; a refusal is raised as PeerRefused

    def answer_offer(self, request: pb.VisitOffer) -> pb.VisitAnswer:
        """A neighbour offers an edge."""
        return self._handshake.answer_offer(request, resting=self._serving.resting)

    def answer_degree(self, request: pb.VisitDegree) -> pb.VisitAnswer:
        """A neighbour tells its degree."""
        return self._handshake.answer_degree(request)

    def answer_pull(self, request: pb.PullRequest) -> AsyncGenerator[bytes]:
        """Stream the asked-for snapshot, once it is published."""
        return self._serving.answer(request)

    def is_closed(self, visit: int) -> bool:
        """Whether the visit's edges are fixed: who comes now is too late for it."""
        return self._handshake.is_closed(visit)

    def _forget_references(self) -> None:
        """Free this node's references and its neighbours': the next exchange is a whole one."""
        self._references = OwnReferences()
        self._gathering.forget_references()
