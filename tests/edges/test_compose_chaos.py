"""The chaos profile of compose, against an engine that does not always do what it is told."""

import importlib.util
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

SECONDS = 60.0
NODES = ("node-0", "node-1", "node-2", "node-3")
NETWORKS = ("public", "private")


def container(name):
    return {
        "State": {
            "Status": "running",
            "Paused": False,
            "ExitCode": 0,
            "OOMKilled": False,
            "Health": {"Status": "healthy"},
        },
        "NetworkSettings": {
            "Networks": {network: {"Aliases": [f"alias-{name}"]} for network in NETWORKS},
        },
    }


class Engine:
    """Docker's answers to the calls of chaos; ``refuses`` says which of them fail."""

    def __init__(self, refuses=lambda verb: False):
        self.containers = {name: container(name) for name in NODES}
        self.refuses = refuses
        self.is_slow = False

    def call_fails_next(self):
        self.is_slow = True

    def call(self, method, path, body=None):
        if self.is_slow:
            self.is_slow = False
            raise OSError("timed out")
        if "filters=" in path:
            return [
                {"Id": name, "Labels": {"com.docker.compose.service": name}}
                for name in self.containers
            ]
        _, kind, name, verb = path.split("?")[0].split("/")
        if method == "GET":
            return json.loads(json.dumps(self.containers[name]))
        if self.refuses(verb):
            raise OSError(f"{method} {path}: 500 unable to freeze: unknown")
        if kind == "networks":
            networks = self.containers[body["Container"]]["NetworkSettings"]["Networks"]
            if verb == "connect":
                assert name not in networks, "an endpoint already exists"
                networks[name] = {"Aliases": body["EndpointConfig"]["Aliases"]}
            else:
                del networks[name]
            return None
        state = self.containers[name]["State"]
        match verb:
            case "pause" | "unpause":
                assert state["Paused"] == (verb == "unpause"), "is not paused"
                state["Paused"] = verb == "pause"
            case "kill":
                state |= {"Status": "exited", "ExitCode": 137}
            case "start" | "restart":
                state |= {"Status": "running", "ExitCode": 0}
        return None


@pytest.fixture
def chaos(monkeypatch):
    path = Path(__file__).parents[2] / "compose/chaos.py"
    spec = importlib.util.spec_from_file_location("compose_chaos", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "compose_chaos", module)  # where a dataclass looks
    spec.loader.exec_module(module)
    ticks = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: next(ticks) * 0.2, sleep=lambda _: None)
    monkeypatch.setattr(module, "time", clock)
    return module


def lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("seed", range(8))
def test_nobody_is_left_hurt(chaos, capsys, seed):
    engine = Engine()
    chaos.disturb(engine, "deca", SECONDS, seed)
    said = lines(capsys)
    assert sum("fault" in line for line in said) == sum("healed" in line for line in said) > 3
    assert engine.containers == {name: container(name) for name in NODES}


@pytest.mark.parametrize("seed", range(8))
def test_what_the_engine_fails_to_do_is_a_fault_less(chaos, capsys, seed):
    """Every third call fails, to hurt and to heal; half a cut is undone as a whole one is."""
    engine = Engine(lambda verb: next(calls) % 3 == 0)
    calls = itertools.count()
    chaos.disturb(engine, "deca", SECONDS, seed)
    said = lines(capsys)
    failed = [line for line in said if "not_done" in line or "not_healed" in line]
    assert failed
    assert all("unable to freeze" in line["why"] for line in failed)
    assert engine.containers == {name: container(name) for name in NODES}


def test_an_engine_that_never_heals_is_given_up(chaos, capsys, monkeypatch):
    """And the verdict names who is not back, also where it looks healthy."""
    engine = Engine(lambda verb: verb in ("unpause", "connect", "start"))
    monkeypatch.setattr(chaos, "Engine", lambda: engine)
    monkeypatch.setattr(chaos.signal, "signal", lambda *_: None)
    for name, value in {"PROJECT": "deca", "MINUTES": "1", "SEED": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        chaos.main()
    assert ended.value.code == 10
    assert engine.containers != {name: container(name) for name in NODES}
    said = lines(capsys)
    assert any("not_healed" in line for line in said)
    assert said[-1]["verdict"] == "not all back"
    assert said[-1]["left_hurt"]


def test_a_verdict_waits_for_an_engine_that_does_not_answer(chaos, capsys, monkeypatch):
    """Under load it may take longer than a call: that is no node that is not back."""
    engine = Engine()
    monkeypatch.setattr(chaos, "Engine", lambda: engine)
    monkeypatch.setattr(chaos.signal, "signal", lambda *_: None)
    monkeypatch.setattr(chaos, "disturb", lambda *_: engine.call_fails_next())
    for name, value in {"PROJECT": "deca", "MINUTES": "1", "SEED": "1"}.items():
        monkeypatch.setenv(name, value)
    chaos.main()
    said = lines(capsys)
    assert "timed out" in said[0]["why"]
    assert said[-1] == {"verdict": "all back", "nodes": dict.fromkeys(NODES, "healthy")}


def test_a_frozen_node_is_not_healthy(chaos):
    """Its last state of health says so for ever."""
    engine = Engine()
    engine.containers["node-0"]["State"]["Paused"] = True
    assert chaos.look(engine, "deca")["node-0"].state == "frozen"


@pytest.mark.parametrize("kind", ["CUT", "KILL"])
def test_one_that_ended_by_itself_is_not_started_again(chaos, kind):
    """A node that fails while it is cut off, or just before it would be killed, has failed."""
    engine = Engine()
    node = chaos.look(engine, "deca")["node-0"]
    fault = chaos.Fault(chaos.Kind[kind], "node-0", 1.0)
    chaos.hurt(engine, fault, node)
    engine.containers["node-0"]["State"] |= {"Status": "exited", "ExitCode": 4}
    chaos.heal(engine, fault, node)
    assert engine.containers["node-0"]["State"]["ExitCode"] == 4
    assert chaos.look(engine, "deca")["node-0"].state == "failed"
