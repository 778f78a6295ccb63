"""The swarm of compose/docker-compose.yml: built, brought up, cut, healed, ended, taken down.

The model is a small random one; everything else is what an operator runs.
"""

import asyncio
import contextlib
import json
import time

import pytest

from deca_node.errors import PeerError
from deca_node.guard import Visitor
from deca_node.keyring import Keyring
from deca_node.pb import node_pb2 as pb
from deca_node.transport.client import ask_status
from tests.containers.engine import (
    BUILD_SECONDS,
    COMPOSE_FILE,
    REPOSITORY,
    EngineError,
    running,
    unavailable,
)

NODES = ("node-0", "node-1", "node-2", "node-3")
# On a ring in the order of their names.
NEIGHBOURS = {
    name: {NODES[(index - 1) % 4], NODES[(index + 1) % 4]} for index, name in enumerate(NODES)
}
DEADLINE = 600.0  # a bound on failure; nothing waits this long when all is well
UP_SECONDS = 600.0

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "never"),
]


@pytest.fixture(scope="module")
def engine():
    with running() as found:
        yield found


@pytest.fixture(scope="module")
def image(engine):
    """The image of this working tree, by the name that the compose file gives it."""
    base = engine.base_image()
    # On the stand-in, PyTorch comes from where this machine's pip finds it.
    torch = "cpu" if base.startswith("python:") else ""
    stack = Stack(engine, BASE_IMAGE=base, TORCH=torch)
    stack.compose("build", timeout=BUILD_SECONDS)
    return stack


@pytest.fixture
def stack(image, engine, tmp_path):
    """A function that sets up a stack; it and its volumes are taken down afterwards."""
    made = []

    def factory(*settings, **variables):
        path = tmp_path / "settings.env"
        path.write_text("".join(f"{line}\n" for line in settings))
        (tmp_path / "own").mkdir(exist_ok=True)
        ours = {"DEMO": "rehearsal", "SETTINGS": str(path), "OWN": str(tmp_path / "own")}
        made.append(Stack(engine, **{**image.variables, **ours, **variables}))
        return made[-1]

    yield factory
    for one in made:
        one.compose("--profile", "*", "down", "--volumes", "--timeout", "10")
    left = engine.run("ps", "--all", "--quiet", "--filter", "label=com.docker.compose.project=deca")
    assert left == ""


class Stack:
    """Commands of `docker compose` as the documentation has them."""

    def __init__(self, engine, **variables):
        self.engine, self.variables = engine, variables
        self.trust = None

    def compose(self, *words, timeout=UP_SECONDS):
        command = ("compose", "--file", str(COMPOSE_FILE), *words)
        return self.engine.run(*command, timeout=timeout, **self.variables)

    def container(self, service):
        return self.compose("ps", "--all", "--quiet", service).strip()

    def exit_code(self, service):
        """None while it runs."""
        state = json.loads(self.engine.run("inspect", self.container(service)))[0]["State"]
        return state["ExitCode"] if state["Status"] == "exited" else None

    def status(self, service):
        """By gRPC from this machine, as the operator; None when it does not answer."""
        number = int(service[-1])
        with contextlib.suppress(PeerError):
            credentials = Visitor(Keyring(self.trust)).credentials()
            return asyncio.run(ask_status(f"127.0.0.1:{7430 + number}", 10, credentials))
        return None

    def answer(self, service):
        """Its status, as soon as it answers: on a busy machine not within every call's deadline."""
        found = []

        def answered():
            found.append(self.status(service))
            return found[-1] is not None

        self.until(answered, f"{service} answers")
        return found[-1]

    def until(self, reached, what):
        limit = time.monotonic() + DEADLINE
        while not reached():
            if time.monotonic() > limit:
                raise AssertionError(f"never: {what}\n{self.compose('logs', '--tail', '25')}")
            time.sleep(0.5)  # between two questions to other processes


def neighbours(status):
    return {peer.node for peer in status.peers if peer.neighbour} if status else set()


def test_a_swarm_comes_up_is_cut_heals_and_stops(engine, stack, tmp_path):
    """Each node has its neighbours; one is off the network and comes back; PID 1 heeds SIGTERM.

    node-3 finds the others by a name that stands for all of them, node-0 to 2 by multicast.
    """
    swarm = stack("DECA_SCHEDULE__ROUNDS=100000")
    override = tmp_path / "named.yml"
    override.write_text(
        "services:\n  node-3:\n    environment:\n      DECA_NETWORK__ZEROCONF: 'false'\n"
        "      DECA_NETWORK__DNS_PEERS: '[\"swarm:7430\"]'\n"
    )
    swarm.compose("--file", str(override), "up", "--detach", "--wait", timeout=UP_SECONDS)
    swarm.trust = tmp_path / "trust"
    swarm.compose("cp", "prepare:/authority", str(swarm.trust))

    def all_have_their_neighbours():
        return all(neighbours(swarm.status(name)) == NEIGHBOURS[name] for name in NODES)

    swarm.until(all_have_their_neighbours, "every node has its neighbours")
    shown = {name: swarm.answer(name) for name in NODES}
    assert {name: status.node for name, status in shown.items()} == {name: name for name in NODES}
    assert all("TLS" in status.security for status in shown.values())
    assert all(status.phase == pb.PHASE_TRAINING for status in shown.values())
    words = ("deca-node", "swarm", "status")
    printed = swarm.compose("exec", "-T", "node-0", *words)
    assert all(name in printed for name in NODES), printed
    reach = (
        "import urllib.request as u; print(u.urlopen('http://node-3:9464/metrics').read().decode())"
    )
    measured = swarm.compose("exec", "-T", "node-0", "python", "-c", reach)
    assert 'node="node-3"' in measured  # for Prometheus, on the private network

    user = swarm.compose("exec", "-T", "node-0", "id", "-u").strip()
    assert user == "10001"
    for path in ("/swarm/x", "/opt/x"):
        with pytest.raises(EngineError, match="Read-only file system"):
            swarm.compose("exec", "-T", "node-0", "touch", path)

    # Off the network: neighbours go around it; it trains on alone.
    cut = swarm.container("node-2")
    swarm.engine.run("network", "disconnect", "deca_swarm", cut)
    swarm.until(
        lambda: all(
            "node-2" not in neighbours(swarm.status(name)) for name in ("node-1", "node-3")
        ),
        "the others go on without node-2",
    )
    before = swarm.answer("node-1").steps_done
    swarm.until(lambda: swarm.answer("node-1").steps_done > before, "a step without node-2")
    swarm.engine.run(
        "network", "connect", "--alias", "node-2", "--alias", "swarm", "deca_swarm", cut
    )
    swarm.until(all_have_their_neighbours, "node-2 is back")
    assert swarm.exit_code("node-2") is None

    # Seconds of what the chaos profile does.
    ours = {"MINUTES": "0.3", "DOCKER_SOCKET": engine.environment.get("DOCKER_HOST", "")[7:]}
    swarm.variables |= {name: value for name, value in ours.items() if value}
    told = swarm.compose("--profile", "chaos", "run", "--rm", "chaos")
    assert '"fault"' in told
    assert '"verdict": "all back"' in told
    swarm.until(all_have_their_neighbours, "all are back after chaos")

    # The first process of a container gets SIGTERM, saves and ends; another start resumes.
    begin = time.monotonic()
    swarm.compose("stop", "node-1")
    assert swarm.exit_code("node-1") == 0
    assert time.monotonic() - begin < 30  # the grace after which the engine kills
    swarm.compose("start", "node-1")
    swarm.until(
        lambda: '"event": "resuming"' in swarm.compose("logs", "--no-log-prefix", "node-1"),
        "node-1 resumes",
    )


def test_without_multicast_the_swarm_ends_with_four_models(stack, tmp_path):
    """Static peers; every container ends by itself with 0, and its volume has a model."""
    swarm = stack("DECA_SCHEDULE__ROUNDS=2")
    swarm.compose("--profile", "static", "up", "--detach", timeout=UP_SECONDS)
    services = [name.replace("node", "static") for name in NODES]

    def ended():
        return all(swarm.exit_code(service) is not None for service in services)

    swarm.until(ended, "all nodes have finished")
    for service in services:
        assert swarm.exit_code(service) == 0, swarm.compose("logs", service)
        to = tmp_path / service
        swarm.compose("cp", f"{service}:/data/out", str(to))
        summary = json.loads((to / "summary.json").read_text())
        assert summary["finished"]
        assert summary["after"]["accuracy"] > summary["before"]["accuracy"]
        assert summary["bytes_received"] > 0
        assert (to / "model" / "model.safetensors").stat().st_size > 1_000_000


def test_only_what_the_image_is_made_of_goes_to_the_builder(image, engine, tmp_path):
    """A key or a run's state that lies in the checkout is in no layer."""
    canaries = [REPOSITORY / name for name in ("canary.key", "compose/canary.key")]
    dockerfile = tmp_path / "Dockerfile"
    base = image.variables["BASE_IMAGE"]
    dockerfile.write_text(f"FROM {base}\nCOPY . /context\nWORKDIR /context\n")
    try:
        for path in canaries:
            path.write_text("secret")
        words = (
            "build",
            "--quiet",
            "--tag",
            "deca-node-test-context",
            "--file",
            str(dockerfile),
            ".",
        )
        engine.run(*words)
        find = ("find", ".", "-type", "f", "-not", "-path", "./deca_node/*")
        sent = engine.run("run", "--rm", "--network", "none", "deca-node-test-context", *find)
    finally:
        for path in canaries:
            path.unlink(missing_ok=True)
        engine.run("image", "rm", "--force", "deca-node-test-context")
    roots = {line.removeprefix("./").split("/")[0] for line in sent.splitlines()}
    assert roots == {
        *("LICENSE", "README.md", "compose", "constraints.txt", "docker", "examples"),
        "pyproject.toml",
    }
    assert ".key" not in sent
