"""Which frame leaves by which port, and when: no I/O and no clock.

Times are seconds of the caller's clock.
"""

import heapq
import random
from collections.abc import Iterator
from dataclasses import dataclass

# What the buffer before a link of limited rate holds; what comes when it is full is dropped.
BUFFER_SECONDS = 0.3


@dataclass(frozen=True)
class Link:
    """One direction between two ports.

    Attributes:
        delay: seconds that every frame takes.
        jitter: up to as many seconds more, drawn for each frame; their order is kept.
        loss: share of the frames that is lost.
        rate: bits per second; unset, a frame takes no time of its own.
        queue: links that name the same queue share one rate, as those through one modem do.
        cut: nothing passes.
        multicast: frames to groups pass, as they do in one room and seldom between two;
            broadcasts pass in any case, else no address would be found.
    """

    delay: float = 0.0002
    jitter: float = 0.0
    loss: float = 0.0
    rate: float | None = None
    queue: str = ""
    cut: bool = False
    multicast: bool = True


@dataclass(order=True)
class _UnderWay:
    release: float
    number: int  # keeps the order of frames that are due at the same moment
    source: str
    target: str
    frame: bytes


class Switch:
    """Moves frames between ports over links.

    Args:
        seed: decides losses and jitter.
    """

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self._ports: dict[bytes, str] = {}
        self._links: dict[tuple[str, str], Link] = {}
        self._heap: list[_UnderWay] = []
        self._number = 0
        self._free: dict[str | tuple[str, str], float] = {}  # when a queue has sent what it holds
        self._last: dict[tuple[str, str], float] = {}  # latest release so far

    def attach(self, port: str, station: bytes) -> None:
        """A port behind which a station of this hardware address (6 bytes) is."""
        self._ports[station] = port

    def connect(self, source: str, target: str, link: Link) -> None:
        """Set one direction; a pair that was never set has a default Link."""
        self._links[source, target] = link

    def link(self, source: str, target: str) -> Link:
        """One direction's settings."""
        return self._links.get((source, target), Link())

    def accept(self, source: str, frame: bytes, now: float) -> None:
        """A frame came in; copies of it are on their way to whom it is for."""
        station = frame[:6]
        if len(frame) < 14:
            return
        if not station[0] & 1:
            target = self._ports.get(station)
            if target is not None and target != source:
                self._send(source, target, frame, now)
            return
        group = station != b"\xff" * 6
        for target in self._ports.values():
            if target != source and (not group or self.link(source, target).multicast):
                self._send(source, target, frame, now)

    def _send(self, source: str, target: str, frame: bytes, now: float) -> None:
        link, pair = self.link(source, target), (source, target)
        if link.cut or (link.loss and self._random.random() < link.loss):
            return
        sent = now
        if link.rate is not None:
            queue = link.queue or pair
            begin = max(now, self._free.get(queue, now))
            if begin - now > BUFFER_SECONDS:
                return
            sent = self._free[queue] = begin + len(frame) * 8 / link.rate
        release = sent + link.delay
        if link.jitter:
            release += self._random.uniform(0, link.jitter)
        release = self._last[pair] = max(release, self._last.get(pair, release))
        self._number += 1
        heapq.heappush(self._heap, _UnderWay(release, self._number, source, target, frame))

    def next_release(self) -> float | None:
        """When the next frame is due."""
        return self._heap[0].release if self._heap else None

    def due(self, now: float) -> Iterator[tuple[str, bytes]]:
        """Ports and frames that leave by them now, in order; a cut loses those under way too."""
        while self._heap and self._heap[0].release <= now:
            moving = heapq.heappop(self._heap)
            if not self.link(moving.source, moving.target).cut:
                yield moving.target, moving.frame
