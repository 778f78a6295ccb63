"""Real daemons watched, paused, saved, exported and stopped, with the verbs that people type."""

import json
import subprocess
import sys
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from deca_node.pb import node_pb2 as pb
from tests.cluster.daemons import Daemon


def typed(*arguments, code=0):
    """What a verb prints; it must end with ``code``, and with one line where that is an error."""
    done = subprocess.run(
        [sys.executable, "-m", "deca_node", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    if code:
        assert done.stderr.startswith("deca-node: error: "), done.stderr
        assert done.stderr.count("\n") == 1
    return done.stderr if code else done.stdout


def scrape(daemon):
    at = next(event["address"] for event in daemon.events() if event["event"] == "metrics")
    with urllib.request.urlopen(at, timeout=60) as answer:
        text = answer.read().decode()
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_an_operators_day(pair):
    """Scrape, save, pause, export, resume, stop: all on one running pair."""
    alice, bob = pair
    alice.until(lambda s: s.steps_done >= 5)
    name = f"{alice.run_name}/alice"

    tree = json.loads(typed("swarm", "status", alice.status().address, "--json"))
    assert {node["node"] for node in tree["nodes"]} == {"alice", "bob"}
    assert [edge["ends"] for edge in tree["edges"]] == [["alice", "bob"]]
    assert tree["edges"][0]["weights"] == [0.5, 0.5]
    assert "alice — bob" in typed("swarm", "status", alice.status().address)

    assert "saved at block visit" in typed("checkpoint", name)
    assert (alice.output / "state").exists()
    refused = typed("pause", alice.status().address.replace("127.0.0.1", "localhost"), code=13)
    assert "socket file" in refused
    assert "nobody" in typed("pause", "nobody", code=3)

    assert "pauses after the step" in typed("pause", name)
    alice.until(lambda s: s.phase == pb.PHASE_PAUSED)
    before = bob.status().steps_done
    now = bob.until(lambda s: s.steps_done >= before + 45)  # over a visit's end: without alice
    assert "paused" in now.peers[0].detail
    paused = alice.status()
    assert paused.phase == pb.PHASE_PAUSED
    assert "resume alice" in paused.waiting_for

    # Nothing moves here now: what is scraped is what status says.
    found = scrape(alice)
    assert found["deca_phase", "paused"] == 1
    peer = paused.peers[0]
    assert found["deca_edge_received_bytes_total", "bob"] == peer.bytes_received > 0
    assert found["deca_edge_sent_bytes_total", "bob"] == peer.bytes_sent > 0
    assert found["deca_edge_wait_seconds_total", "bob"] == pytest.approx(peer.waited_seconds)
    assert found["deca_edge_weight", "bob"] == peer.weight == 0.5
    assert found["deca_schedule_steps_done",] == paused.steps_done
    assert found["deca_loss",] == pytest.approx(paused.loss)
    assert found["deca_steps_total",] == len(alice.history())

    assert "exports/friday" in typed("export", name, "--name", "friday")
    AutoModelForCausalLM.from_pretrained(alice.output / "exports" / "friday")
    assert "already exists" in typed("export", name, "--name", "friday", code=8)
    assert "a name is" in typed("export", name, "--name", "../../tmp/x", code=13)
    assert sorted(p.name for p in (alice.output / "exports").iterdir()) == ["friday"]

    steps = len(alice.history())
    assert "takes part again" in typed("resume", name)
    alice.until(lambda s: s.phase == pb.PHASE_TRAINING and any(p.neighbour for p in s.peers))
    alice.until(lambda s: s.steps_done > paused.steps_done + 20)
    again = alice.history()[steps:]
    assert again[-1]["neighbours"] == ["bob"]
    assert again[0]["visit"] > alice.history()[steps - 1]["visit"]

    assert "stops" in typed("stop", name)
    assert alice.wait() == 0
    assert "stopped, state saved" in alice.log.read_text()

    curves = EventAccumulator(str(alice.folder / "curves" / "alice"))
    curves.Reload()
    rows = {row["visit"] * 20 + row["step"]: row for row in alice.history()}
    for tag, key in (("loss", "loss"), ("norm/h", "h_norm"), ("disagreement", "disagreement")):
        points = {point.step: point.value for point in curves.Scalars(tag)}
        assert points == pytest.approx({serial: row[key] for serial, row in rows.items()})


def test_a_taken_port_for_metrics_ends_the_start_with_a_line(pair):
    alice, _ = pair
    alice.until(lambda s: s.steps_done >= 1)
    at = next(event["address"] for event in alice.events() if event["event"] == "metrics")
    port = at.rpartition(":")[2].partition("/")[0]
    other = Daemon(alice.folder, "carol", [*alice.settings, f"metrics.port={port}"])
    other.settings += ["node.name=carol", f"node.output={other.output}"]
    other.start()
    assert other.wait() == 6
    assert f"cannot serve metrics on 127.0.0.1:{port}" in other.log.read_text().splitlines()[-1]
