"""Multicast on this machine, and whether the very node runs here."""

import asyncio
import contextlib
from collections.abc import Iterable

from deca_node import access, registry, status
from deca_node.discovery import loops_back, multicast_addresses
from deca_node.doctor.checks import Check, Facts, Verdict
from deca_node.errors import PeerError, TrustError
from deca_node.pb import node_pb2 as pb
from deca_node.transport.client import ask_status

ASK_SECONDS = 3.0


async def multicast(facts: Facts) -> list[Check]:
    """Whether what this machine sends to all comes back to it, by interface."""
    network = facts.settings.network
    if not network.zeroconf:
        return [Check("multicast", Verdict.OK, "not used: network.zeroconf is off")]
    named = network.static_peers or network.dns_peers
    other_way = named or facts.settings.run.start_when == 1
    try:
        places = await asyncio.to_thread(multicast_addresses, network.interfaces)
    except OSError as error:  # as where seccomp forbids the question
        return [
            Check(
                "multicast",
                Verdict.WARN if other_way else Verdict.FAIL,
                f"this machine's interfaces cannot be listed: {error.strerror or error}",
                "set network.interfaces and node.advertise, or network.zeroconf = false with "
                "network.static_peers",
            )
        ]
    heard = await asyncio.gather(*(asyncio.to_thread(loops_back, at) for at in places))
    deaf = [at for at, hears in zip(places, heard, strict=True) if not hears]
    if not deaf:
        return [Check("multicast", Verdict.OK, f"works on {', '.join(places)}")]
    alone = len(deaf) == len(places)
    return [
        Check(
            "multicast",
            Verdict.FAIL if alone and not other_way else Verdict.WARN,
            f"packets sent on {', '.join(deaf)} are not received back",
            "allow port 5353/udp there, choose other network.interfaces, or set "
            "network.static_peers",
        )
    ]


async def find_running(facts: Facts) -> None:
    """Ask the very node for its status, where it runs on this machine."""
    own = facts.settings
    for entry in registry.local_nodes():
        if (entry.run, entry.node) == (own.run.name, own.node.name):
            with contextlib.suppress(PeerError, TrustError):
                shown = await access.credentials([entry.address])
                facts.running = await ask_status(
                    entry.address, ASK_SECONDS, shown.get(entry.address)
                )


def running(now: pb.NodeStatus) -> Iterable[Check]:
    """The node is there already: it knows its own peers, and must not be disturbed."""
    about = f"{status.phase(now.phase)} at {now.address}, pid {now.pid}, {now.version}"
    yield Check("node", Verdict.OK, f"{now.node} is running: {about}")
    for warning in now.warnings:
        yield Check("node", Verdict.WARN, warning)
    for peer in now.peers:
        well = peer.state in ("alive", "done")
        found = f"{peer.node} at {peer.address}: {peer.state}"
        yield Check(
            "peer",
            Verdict.OK if well else Verdict.WARN,
            found + (f", {peer.detail}" if peer.detail else ""),
        )
