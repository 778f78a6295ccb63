"""A made-up swarm that answers a dashboard as nodes do, for tests and for looking at the page."""

import math
import random

from deca_node import topology
from deca_node.errors import PeerUnavailable
from deca_node.mixing import metropolis_hastings
from deca_node.pb import node_pb2 as pb
from deca_node.topology import TopologySpec

LABELS = ("business", "entertainment", "politics", "sport", "tech")


class PretendSwarm:
    """Nodes that train at one step a second of ``now``.

    Args:
        count: nodes.
        kind: of the topology.
        rounds, blocks, steps: of the schedule.
        share: whether nodes tell their label counts.
    """

    def __init__(
        self, count=4, *, kind="ring", rounds=3, blocks=10, steps=12, share=True, run="bbc", seed=0
    ):
        self.names = [f"node-{index}" for index in range(count)]
        self.run, self.rounds, self.blocks, self.steps = run, rounds, blocks, steps
        self.kind, self.share, self.seed = kind, share, seed
        self.now = 0.0
        self.down = {}  # name -> since when
        self.ended = set()
        self.warnings = {}
        self.slow = set()  # pairs of names
        self.asked = []

    def address(self, name):
        return f"127.0.0.1:{17430 + self.names.index(name)}"

    @property
    def addresses(self):
        return [self.address(name) for name in self.names]

    async def link(self, address):
        return _Link(self, address)

    def graph(self):
        alive = [n for n in self.names if n not in self.down or self.now - self.down[n] < 6]
        return topology.graph(alive, TopologySpec(self.kind, p=0.25, seed=self.seed))

    def total(self):
        return self.rounds * self.blocks * self.steps

    def done(self, name):
        """Steps made; a node that is down stopped at that moment."""
        until = self.down.get(name, self.now)
        late = self.names.index(name) % 3
        return max(0, min(int(until) - late, self.total()))

    def point(self, name, serial):
        source = random.Random(f"{name}/{serial}")
        index = self.names.index(name)
        share = serial / self.total()
        loss = (2.6 - 0.1 * (index % 5)) * math.exp(-3.2 * share) + 0.35 + 0.02 * (index % 7)
        noise = source.gauss(0, 0.16 * (0.4 + loss / 3))
        visit, step = divmod(serial, self.steps)
        wave = 0.004 * math.exp(-1.2 * share) * (0.25 + math.exp(-step / 4)) * (1 + (index % 4) / 6)
        return pb.HistoryPoint(
            first=serial,
            last=serial,
            loss=max(0.05, loss + noise),
            gradient_norm=max(0.05, 2.2 * math.exp(-share) + source.gauss(0, 0.3)),
            h_norm=1.0,
            disagreement=wave * math.exp(source.gauss(0, 0.18)) * (1 + (visit % self.blocks) / 9),
            seconds=0.9 + source.random() / 5,
        )

    def status(self, name):
        done, total = self.done(name), self.total()
        serial = max(done - 1, 0)
        visit, step = divmod(min(serial, total - 1), self.steps)
        round_, position = divmod(visit, self.blocks)
        graph = self.graph()
        near = graph.get(name, frozenset())
        weights = metropolis_hastings(len(near), {other: len(graph[other]) for other in near})
        last = self.point(name, serial)
        index = self.names.index(name)
        now = pb.NodeStatus(
            run=self.run,
            node=name,
            version="0.1.0",
            phase=pb.PHASE_TRAINING if done < total else pb.PHASE_SERVING,
            round=round_,
            position=position,
            block=position,
            step=step,
            rounds=self.rounds,
            blocks=self.blocks,
            steps_per_visit=self.steps,
            steps_done=done,
            steps_total=total,
            eta_seconds=1.1 * (total - done),
            uptime_seconds=self.now,
            loss=last.loss,
            gradient_norm=last.gradient_norm,
            h_norm=1.0,
            disagreement=last.disagreement,
            degree=len(near),
            own_weight=1 - sum(weights.values()),
            device="cpu",
            memory_bytes=(1 << 30) + index * (40 << 20),
            bytes_sent=done * 13_400_000 * len(near),
            bytes_received=done * 13_400_000 * len(near),
            send_rate=13.4e6 * len(near) * (0.9 + (index % 3) / 20),
            receive_rate=13.4e6 * len(near),
            address=self.address(name),
            model="SmolLM2-135M-Instruct",
            pid=4000 + index,
            members_wanted=len(self.names),
            method="deca",
            topology=self.kind,
            warnings=self.warnings.get(name, []),
            round_order=range(self.blocks),
            block_disagreement=[
                0.0005 * (1 + b) * (1.3 if b > position else 1)
                if visit >= self.blocks or b <= position
                else math.nan
                for b in range(self.blocks)
            ],
        )
        if self.share:
            source = random.Random(f"labels/{name}")
            for label in LABELS:
                now.label_counts[label] = int(460 * source.betavariate(0.35, 1.1))
        for other in self.names:
            if other == name:
                continue
            gone = other in self.down and self.now - self.down[other] >= 6
            suspect = other in self.down and not gone
            crawls = frozenset((name, other)) in self.slow
            peer = now.peers.add(
                node=other,
                address=self.address(other),
                state="gone" if gone else "suspect" if suspect else "alive",
                phase=now.phase,
                visit=visit,
                neighbour=other in near,
                weight=weights.get(other, 0.0),
                last_seen_seconds=self.now - self.down[other] if other in self.down else 0.4,
                waited_seconds=self.now * (0.5 if crawls else 0.02) if other in near else 0,
                detail="no greeting" if gone or suspect else "",
            )
            if other in near:
                peer.bytes_sent = peer.bytes_received = done * 13_400_000
                peer.send_rate = peer.receive_rate = 13.4e6
            if gone:
                peer.retries = 3
        self._events(now, name)
        return now

    def _events(self, now, name):
        told = [(0.0, "started", "started, deca-node 0.1.0", "")]
        told += [
            (1.0 + i / 9, "joined", "joined", o) for i, o in enumerate(self.names) if o != name
        ]
        for visit in range(self.blocks, self.done(name) // self.steps, self.blocks):
            told.append(
                (visit * self.steps, "saved", f"saved its state at visit {visit}, step 0", "")
            )
        for other, at in self.down.items():
            told.append((at + 2, "suspect", "suspect: no greeting", other))
            told.append((at + 6, "gone", "gone: no greeting", other))
        for text in self.warnings.get(name, []):
            told.append((30.0, "warning", text, ""))
        past = [event for event in sorted(told) if event[0] <= self.now]
        for serial, (at, kind, text, peer) in enumerate(past, 1):
            now.events.add(
                serial=serial, age_seconds=self.now - at, kind=kind, text=text, peer=peer
            )


class _Link:
    def __init__(self, swarm, address):
        self.swarm, self.address = swarm, address

    def _name(self):
        self.swarm.asked.append(self.address)
        for name in self.swarm.names:
            if self.swarm.address(name) == self.address and name not in self.swarm.down:
                return name
        raise PeerUnavailable(f"{self.address}: connection refused")

    async def get_status(self, timeout):
        return self.swarm.status(self._name())

    async def get_history(self, after, limit, timeout):
        name = self._name()
        first = 0 if after is None else after + 1
        return [self.swarm.point(name, s) for s in range(first, self.swarm.done(name))][-limit:]

    async def close(self):
        pass
