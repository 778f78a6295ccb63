"""What the chaos profile does to the nodes of docker-compose.yml, through the engine's socket.

The faults are those of `deca-node chaos`, drawn in deca_node/faults.py: a node is killed, paused,
taken off the network or restarted every few seconds, never all of them at once. It ends well when
every node is healthy again, or has finished its run.
"""

import http.client
import json
import os
import random
import re
import signal
import socket
import sys
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from deca_node import faults
from deca_node.faults import Fault, Kind, Roster

SOCKET = "/var/run/docker.sock"
API = "/v1.41"  # Docker 20.10, of 2020, and all after it
CALL_SECONDS = 60.0
RECOVERY_SECONDS = 180.0
AGAIN_SECONDS = 2.0  # between two tries to undo a fault
LAST_TRIES = 3  # to undo each when chaos itself is ended; the engine kills it soon
IS_NODE = re.compile(r"(node|static|gpu)-[0-9]+")


class Engine:
    """The few calls of the engine's HTTP interface that chaos needs."""

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """Make a call.

        Raises:
            OSError: there is no engine, or it said no.
        """
        connection = http.client.HTTPConnection("engine", timeout=CALL_SECONDS)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(CALL_SECONDS)
        connection.sock.connect(SOCKET)
        try:
            payload = None if body is None else json.dumps(body)
            connection.request(method, API + path, payload, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            content = answer.read()
        except http.client.HTTPException as error:
            raise OSError(f"{method} {path}: {error!r}") from None
        finally:
            connection.close()
        if answer.status >= 400:
            raise OSError(f"{method} {path}: {answer.status} {content.decode()}")
        return json.loads(content) if content else None


@dataclass
class Node:
    """A container as the engine shows it: healthy, starting, frozen, finished or failed."""

    name: str
    container: str
    state: str
    networks: dict[str, list[str]]


def look(engine: Engine, project: str) -> dict[str, Node]:
    """The nodes of a compose project by their service's name."""
    wanted = quote(json.dumps({"label": [f"com.docker.compose.project={project}"]}))
    found = {}
    for row in engine.call("GET", f"/containers/json?all=1&filters={wanted}"):
        name = row["Labels"]["com.docker.compose.service"]
        if IS_NODE.fullmatch(name):
            details = engine.call("GET", f"/containers/{row['Id']}/json")
            state = details["State"]
            if state["Paused"]:  # its last state of health stands still, too
                shown = "frozen"
            elif state["Status"] == "exited":
                shown = "failed" if state["ExitCode"] else "finished"
            else:
                healthy = state.get("Health", {}).get("Status") == "healthy"
                shown = "healthy" if healthy else "starting"
            networks = {
                network: [alias for alias in end["Aliases"] or [] if alias != row["Id"][:12]]
                for network, end in details["NetworkSettings"]["Networks"].items()
            }
            found[name] = Node(name, row["Id"], shown, networks)
    return found


def seen(engine: Engine, project: str, at: float) -> dict[str, Node]:
    """The same; none where an engine under load does not tell, which is said."""
    try:
        return look(engine, project)
    except OSError as error:
        say(at=round(at, 1), not_seen=project, why=str(error))
        return {}


def hurt(engine: Engine, fault: Fault, node: Node) -> None:
    """Do it."""
    at = f"/containers/{node.container}"
    match fault.kind:
        case Kind.KILL:
            engine.call("POST", f"{at}/kill?signal=SIGKILL")
        case Kind.FREEZE:
            engine.call("POST", f"{at}/pause")
        case Kind.RESTART:
            engine.call("POST", f"{at}/restart?t=30")
        case _:
            body = {"Container": node.container}
            for network in node.networks:
                engine.call("POST", f"/networks/{network}/disconnect", body)


def heal(engine: Engine, fault: Fault, node: Node) -> None:
    """Undo what is left of a fault; what it never did, or is already undone, is let be."""
    at = f"/containers/{node.container}"
    details = engine.call("GET", f"{at}/json")
    if details["State"]["Paused"]:
        engine.call("POST", f"{at}/unpause")
    for network, aliases in node.networks.items():
        if network not in details["NetworkSettings"]["Networks"]:
            settings = {"Aliases": aliases}  # by which others call it
            body = {"Container": node.container, "EndpointConfig": settings}
            engine.call("POST", f"/networks/{network}/connect", body)
    # Only as it is stopped here: one that ended by itself is for the verdict.
    state, code = details["State"], {Kind.KILL: 137, Kind.RESTART: 0}.get(fault.kind)
    if state["Status"] == "exited" and state["ExitCode"] == code and not state["OOMKilled"]:
        engine.call("POST", f"{at}/start")


def say(**what: Any) -> None:
    """A line of the log."""
    print(json.dumps(what), flush=True)


def disturb(engine: Engine, project: str, seconds: float, seed: int) -> list[str]:
    """Hurt nodes for a while, and undo it whatever happens; returns those that are left hurt.

    An engine under load may fail to freeze a container: that is a fault less, not a swarm that
    failed. What it fails to undo is tried again.
    """
    draw = random.Random(seed)
    began = time.monotonic()
    under: dict[str, tuple[float, Fault, Node]] = {}
    next_at = 0.0

    def undo(name: str, now: float) -> None:
        _, fault, node = under[name]
        try:
            heal(engine, fault, node)
        except OSError as error:
            say(at=round(now, 1), not_healed=name, of=fault.kind, why=str(error))
            under[name] = (now + AGAIN_SECONDS, fault, node)
        else:
            del under[name]
            say(at=round(now, 1), healed=name, of=fault.kind)

    try:
        while (now := time.monotonic() - began) < seconds or under:
            if now > seconds + RECOVERY_SECONDS:
                break
            for name, (until, _, _) in list(under.items()):
                if now >= until:
                    undo(name, now)
            if next_at <= now < seconds:
                next_at = now + faults.pause(draw)
                nodes = seen(engine, project, now)
                free = {n: node for n, node in nodes.items() if n not in under}
                roster = Roster(
                    tuple(sorted(n for n, node in free.items() if node.state == "healthy")),
                    tuple(sorted(n for n, node in free.items() if node.state == "starting")),
                    faulty=tuple(under),
                )
                fault, _ = faults.next_fault(draw, roster, now, seconds)
                if fault is not None:
                    under[fault.node] = (now + fault.seconds, fault, nodes[fault.node])
                    told = {"node": fault.node, "seconds": fault.seconds}
                    try:
                        hurt(engine, fault, nodes[fault.node])
                    except OSError as error:
                        say(at=round(now, 1), not_done=fault.kind, **told, why=str(error))
                        under[fault.node] = (now, fault, nodes[fault.node])
                    else:
                        say(at=round(now, 1), fault=fault.kind, **told)
            time.sleep(0.2)
    finally:
        for _ in range(LAST_TRIES):
            for name in list(under):
                undo(name, time.monotonic() - began)
    return sorted(under)


def main() -> None:
    """Exit code 10 when a node does not come back."""
    # As the first process of a container it has no default handler; what is hurt is healed first.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    project = os.environ["PROJECT"]
    engine = Engine()
    if not look(engine, project):
        sys.exit(f"chaos: project {project} has no nodes; start them first")
    seconds, seed = 60 * float(os.environ["MINUTES"]), int(os.environ["SEED"])
    if left := disturb(engine, project, seconds, seed):
        say(verdict="not all back", left_hurt=left)
        sys.exit(10)
    began = time.monotonic()
    while True:
        past = time.monotonic() - began
        states = {n: node.state for n, node in seen(engine, project, seconds + past).items()}
        if states and set(states.values()) <= {"healthy", "finished"}:
            say(verdict="all back", nodes=states)
            return
        if past > RECOVERY_SECONDS:
            say(verdict="not all back", nodes=states)
            sys.exit(10)
        time.sleep(1)


if __name__ == "__main__":
    main()
