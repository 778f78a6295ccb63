"""A node's measurements for Prometheus; the only file that imports prometheus_client.

What is served is made at each scrape from the status of that moment and the last step, so that its
labels are those of now: peers (at most limits.MAX_MEMBERS), blocks of the model, and words of ours.
"""

import contextlib
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from deca_node.errors import ListenError
from deca_node.membership import State
from deca_node.pb import node_pb2 as pb
from deca_node.rounds import StepRecord

# One scrape is answered at a time; who sends or reads more slowly than this is hung up on.
SCRAPE_SECONDS = 5.0
_PHASES = {value: name.removeprefix("PHASE_").lower() for name, value in pb.Phase.items() if value}


class Measurements(Collector):
    """The node's status and last step, as metric families.

    Told of steps on the event loop's thread, read on the server's: each attribute is replaced in
    one piece.

    Args:
        status: called on the server's thread for the status now; None when there is none.
    """

    def __init__(self, status: Callable[[], pb.NodeStatus | None]) -> None:
        self._status = status
        self._step: StepRecord | None = None
        self._blocks: dict[int, float] = {}  # disagreement at the last step of each
        self._steps = 0
        self._seconds = dict.fromkeys(("gradient", "exchange", "update"), 0.0)
        self._exposed = 0.0
        self._before: tuple[int, int, int] | None = None

    def began(self, sent: int, received: int, incomplete: int) -> None:
        """The run's bytes and incomplete mixes before this process.

        Prometheus takes a counter that is lower than before to have begun at 0. After a crash the
        run's own may be: they are those of the last save.
        """
        self._before = sent, received, incomplete

    def stepped(self, record: StepRecord) -> None:
        """A step is complete."""
        seconds = record.seconds
        self._blocks = {**self._blocks, record.visit.block: record.settled.disagreement}
        self._steps += 1
        self._seconds = {
            "gradient": self._seconds["gradient"] + seconds.gradient,
            "exchange": self._seconds["exchange"] + seconds.swap,
            "update": self._seconds["update"] + seconds.step - seconds.gradient - seconds.swap,
        }
        self._exposed += record.gathered.exposed
        self._step = record

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client's Collector."""
        now = self._status()
        if now is None:
            return
        yield from _about(now)
        yield from _place(now)
        yield from self._training()
        yield from self._exchange(now)
        yield from _traffic(now)
        yield from _edges(now)

    def _training(self) -> Iterator[Metric]:
        yield _counter("deca_steps", "Steps done by this process.", self._steps)
        parts = CounterMetricFamily(
            "deca_step_seconds", "Wall time of steps, by what it went into.", labels=["part"]
        )
        for part, seconds in self._seconds.items():
            parts.add_metric([part], seconds)
        yield parts
        yield _counter(
            "deca_exposed_wait_seconds",
            "Of the exchange: nothing was computed or mixed, only waited.",
            self._exposed,
        )
        step = self._step
        if step is None:
            return
        yield _gauge("deca_loss", "Loss of the last step's batch, nats a token.", step.local.loss)
        yield _gauge(
            "deca_gradient_norm",
            "L2 norm of the active block's gradient in the last step.",
            step.local.gradient_norm,
        )
        yield _gauge("deca_h_norm", "L2 norm of h in the last step.", step.settled.h_norm)
        yield _gauge(
            "deca_discrepancy",
            "L2 norm of what the last step changed in the block.",
            step.settled.discrepancy,
        )
        yield _gauge(
            "deca_disagreement",
            "L2 norm of what the last step's mix changed in the block.",
            step.settled.disagreement,
        )
        blocks = GaugeMetricFamily(
            "deca_block_disagreement",
            "Disagreement in the last step of each block that this process has trained.",
            labels=["block"],
        )
        for block, value in sorted(self._blocks.items()):
            blocks.add_metric([str(block)], value)
        yield blocks

    def _exchange(self, now: pb.NodeStatus) -> Iterator[Metric]:
        if self._before is None:
            return
        sent, received, incomplete = self._before
        yield _counter(
            "deca_sent_bytes", "Bytes of blocks sent by this process.", now.bytes_sent - sent
        )
        yield _counter(
            "deca_received_bytes", "Bytes of blocks received by it.", now.bytes_received - received
        )
        yield _counter(
            "deca_incomplete_mixes",
            "Its steps in which a neighbour's part was missing or partial.",
            now.incomplete_mixes - incomplete,
        )


def _about(now: pb.NodeStatus) -> Iterator[Metric]:
    labels = {
        "run": now.run,
        "node": now.node,
        "version": now.version,
        "model": now.model,
        "device": now.device,
    }
    about = GaugeMetricFamily(
        "deca_node_info",
        "Always 1: who this node is, to be joined to the others.",
        labels=list(labels),
    )
    about.add_metric(list(labels.values()), 1)
    yield about
    phases = GaugeMetricFamily(
        "deca_phase", "1 for what the node is doing, 0 for the others.", labels=["phase"]
    )
    for number, name in _PHASES.items():
        phases.add_metric([name], float(number == now.phase))
    yield phases
    yield _gauge("deca_warnings", "Warnings that status shows.", len(now.warnings))
    yield _gauge("deca_memory_bytes", "Memory of the process, as in status.", now.memory_bytes)
    yield _gauge(
        "deca_device_memory_bytes",
        "Memory that tensors take on the GPU; 0 without one.",
        now.device_memory_bytes,
    )


def _place(now: pb.NodeStatus) -> Iterator[Metric]:
    yield _gauge("deca_schedule_steps", "Steps of the whole run.", now.steps_total)
    yield _gauge("deca_schedule_steps_done", "Of those, done.", now.steps_done)
    yield _gauge("deca_round", "Round under way, from 0.", now.round)
    yield _gauge("deca_block", "Block under way, from 0.", now.block)
    yield _gauge("deca_step", "Step under way in the block visit, from 0.", now.step)
    yield _gauge("deca_eta_seconds", "Expected until the last step; 0: unknown.", now.eta_seconds)
    yield _gauge("deca_catch_up_bytes", "Fetched while catching up; else 0.", now.catch_up_bytes)
    yield _gauge(
        "deca_catch_up_target_bytes", "To be fetched, those included; else 0.", now.catch_up_total
    )


def _traffic(now: pb.NodeStatus) -> Iterator[Metric]:
    refusals = CounterMetricFamily(
        "deca_refusals", "What peers sent and was refused, by reason.", labels=["reason"]
    )
    for reason, count in sorted(now.refusals.items()):
        refusals.add_metric([reason], count)
    yield refusals
    states = GaugeMetricFamily("deca_peers", "Peers, by their state.", labels=["state"])
    for state in State:
        states.add_metric([str(state)], sum(peer.state == state for peer in now.peers))
    yield states
    yield _gauge("deca_degree", "Neighbours in the block visit.", now.degree)
    yield _gauge("deca_own_weight", "The node's own weight in the mix.", now.own_weight)


def _edges(now: pb.NodeStatus) -> Iterator[Metric]:
    """Of each peer with which a block was exchanged, or is to be."""
    peers = [p for p in now.peers if p.neighbour or p.bytes_sent or p.bytes_received]
    gauges = {
        "deca_edge_weight": ("Weight in the mix; 0 without an edge now.", "weight"),
        "deca_edge_silence_seconds": (
            "Seconds since the peer was last heard.",
            "last_seen_seconds",
        ),
    }
    counters = {
        "deca_edge_sent_bytes": ("Bytes of blocks sent to the peer.", "bytes_sent"),
        "deca_edge_received_bytes": ("Bytes of blocks received from it.", "bytes_received"),
        "deca_edge_wait_seconds": ("That steps waited for its blocks.", "waited_seconds"),
        "deca_edge_retries": ("Handshake calls that failed and were made again.", "retries"),
    }
    for kind, table in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
        for name, (text, field) in table.items():
            family = kind(name, text, labels=["peer"])
            for peer in peers:
                family.add_metric([peer.node], getattr(peer, field))
            yield family
    healthy = GaugeMetricFamily(
        "deca_edge_up", "1 where the peer is alive, else 0.", labels=["peer"]
    )
    for peer in peers:
        healthy.add_metric([peer.node], float(peer.state == State.ALIVE))
    yield healthy


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    """``_total`` is added to the name."""
    return CounterMetricFamily(name, text, value=value)


class _Handler(WSGIRequestHandler):
    """A scrape, in SCRAPE_SECONDS or not at all: one thread serves all, and ends with the node."""

    def setup(self) -> None:
        """See BaseRequestHandler."""
        super().setup()
        self._limit = threading.Timer(SCRAPE_SECONDS, self._hang_up)
        self._limit.daemon = True
        self._limit.start()

    def finish(self) -> None:
        """See BaseRequestHandler."""
        self._limit.cancel()
        with contextlib.suppress(OSError):  # hung up on
            super().finish()

    def _hang_up(self) -> None:
        with contextlib.suppress(OSError):  # gone by itself
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: object) -> None:
        """A scrape every few seconds is no news."""


class _Server(WSGIServer):
    allow_reuse_port = False  # two nodes on one port would share its scrapes

    def __init__(self, host: str, port: int) -> None:
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        """Without asking a name server who we are."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()


class Endpoint:
    """``/metrics`` on a port of its own, served by one thread.

    Args:
        host: address to listen on.
        port: 0 takes a free one.
        measurements: what is served, beside the process's own memory and CPU time.

    Attributes:
        port: that it listens on.

    Raises:
        ListenError: it cannot.
    """

    def __init__(self, host: str, port: int, measurements: Measurements) -> None:
        registry = CollectorRegistry()
        registry.register(measurements)
        ProcessCollector(registry=registry)
        try:
            self._server = _Server(host, port)
        except OSError as error:
            raise ListenError(
                f"cannot serve metrics on {host}:{port}: {error.strerror or error}; set "
                "metrics.port (0 takes a free one) or metrics.host"
            ) from None
        self._server.set_app(make_wsgi_app(registry))
        self.port = int(self._server.server_port)
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop listening; waits for a scrape under way."""
        self._server.shutdown()
        self._server.server_close()
