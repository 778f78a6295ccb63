"""What is served for Prometheus, and the dashboard that shows it."""

import json
import math
import re
import shutil
import socket
import subprocess
import urllib.request
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from deca_node.blocks import Schedule, partition_layers
from deca_node.errors import ListenError
from deca_node.exchange import Gathered
from deca_node.membership import Edges
from deca_node.methods import Local, Settled
from deca_node.pb import node_pb2 as pb
from deca_node.prometheus import Endpoint, Measurements
from deca_node.rounds import Seconds, StepRecord

DASHBOARD = Path(__file__).parents[2] / "deploy/grafana/deca-node.json"
WATCHING = Path(__file__).parents[2] / "docs/watching.md"
PROMTOOL = shutil.which("promtool")
SCHEDULE = Schedule(partition_layers(6, 1), 2, 3, "ascending", 0)


def record(visit: int, step: int = 0, **local: float) -> StepRecord:
    return StepRecord(
        SCHEDULE.visit(visit),
        step,
        Local(local.get("loss", 2.5), 0.75),
        Settled(discrepancy=0.3, h_norm=1.0, disagreement=0.125 * (visit + 1)),
        Gathered(wait=0.5, exposed=0.25),
        Edges(visit, 1, {"bob": 0.5}),
        Seconds(gradient=2.0, swap=1.0, ahead=0.0, step=3.5),
    )


def status() -> pb.NodeStatus:
    now = pb.NodeStatus(
        run="bbc",
        node="alice",
        version="1",
        phase=pb.PHASE_TRAINING,
        steps_total=36,
        steps_done=7,
        degree=1,
        own_weight=0.5,
        memory_bytes=3 << 30,
        bytes_sent=1000,
        bytes_received=900,
        refusals={"late": 3, "checksum": 1},
        warnings=["low"],
    )
    now.peers.add(
        node="bob",
        state="alive",
        neighbour=True,
        weight=0.5,
        bytes_sent=700,
        bytes_received=600,
        waited_seconds=4.5,
        retries=2,
    )
    now.peers.add(node="carol", state="gone", bytes_sent=300, bytes_received=300)
    now.peers.add(node="dave", state="refused")
    return now


def scrape(port: int) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample by name and labels, as Prometheus reads them."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def alerts() -> str:
    """The file of rules that docs/watching.md shows."""
    [text] = re.findall(r"^```yaml title=alerts.yml\n(.*?)^```$", WATCHING.read_text(), re.M | re.S)
    return text


class Stands:
    """A node's status, as it is told."""

    now: pb.NodeStatus | None = None

    def __call__(self) -> pb.NodeStatus | None:
        return self.now


@pytest.fixture
def served():
    stands = Stands()
    measurements = Measurements(stands)
    measurements.stands = lambda now: setattr(stands, "now", now)
    measurements.began(0, 0, 0)
    endpoint = Endpoint("127.0.0.1", 0, measurements)
    yield measurements, endpoint.port
    endpoint.close()


def test_a_scrape_tells_the_last_step_the_edges_and_the_refusals(served) -> None:
    """Counters have the sums, gauges the last values, each under the names of its labels."""
    measurements, port = served
    measurements.stands(status())
    measurements.stepped(record(0))
    measurements.stepped(record(1))
    found = scrape(port)
    assert found["deca_loss", ()] == 2.5
    assert found["deca_h_norm", ()] == 1.0
    assert found["deca_disagreement", ()] == 0.25
    assert found["deca_block_disagreement", (("block", "0"),)] == 0.125
    assert found["deca_block_disagreement", (("block", "1"),)] == 0.25
    assert found["deca_steps_total", ()] == 2
    assert found["deca_step_seconds_total", (("part", "update"),)] == 1.0
    assert found["deca_exposed_wait_seconds_total", ()] == 0.5
    assert found["deca_edge_weight", (("peer", "bob"),)] == 0.5
    assert found["deca_edge_sent_bytes_total", (("peer", "bob"),)] == 700
    assert found["deca_edge_wait_seconds_total", (("peer", "bob"),)] == 4.5
    assert found["deca_edge_up", (("peer", "carol"),)] == 0
    assert found["deca_refusals_total", (("reason", "late"),)] == 3
    assert found["deca_phase", (("phase", "training"),)] == 1
    assert sum(v for (name, _), v in found.items() if name == "deca_phase") == 1
    assert found["deca_peers", (("state", "gone"),)] == 1
    assert "process_cpu_seconds_total" in {name for name, _ in found}


def test_after_a_crash_counters_begin_at_zero(served) -> None:
    """Those of the run go back to the last save: Prometheus would add the whole of it again."""
    measurements, port = served
    now = status()
    measurements.stands(now)
    now.incomplete_mixes = 4
    measurements.began(now.bytes_sent, now.bytes_received, now.incomplete_mixes)
    found = scrape(port)
    names = ("deca_sent_bytes_total", "deca_received_bytes_total", "deca_incomplete_mixes_total")
    assert [found[name, ()] for name in names] == [0, 0, 0]
    now.bytes_sent, now.bytes_received, now.incomplete_mixes = 1500, 1000, 5
    found = scrape(port)
    assert [found[name, ()] for name in names] == [500, 100, 1]


def test_before_the_state_is_read_there_is_no_count_of_what_was_sent() -> None:
    now = status()
    measurements = Measurements(lambda: now)
    names = {metric.name for metric in measurements.collect()}
    assert "deca_degree" in names
    assert not {"deca_sent_bytes", "deca_received_bytes", "deca_incomplete_mixes"} & names


def test_the_alerts_of_the_documents_ask_for_what_is_served(served) -> None:
    """Names and the values of labels; what Prometheus adds itself is not looked at."""
    measurements, port = served
    measurements.stands(status())
    measurements.stepped(record(0))
    found = scrape(port)
    rules = yaml.safe_load(alerts())["groups"][0]["rules"]
    asked = " ".join(rule["expr"] for rule in rules)
    assert len(rules) == 3
    assert set(re.findall(r"\bdeca_\w+", asked)) <= {name for name, _ in found}
    told = re.findall(r'deca_phase\{phase=~?"([\w|]+)"\}', asked)
    phases = {phase for one in told for phase in one.split("|")}
    assert phases == {"training", "serving", "done"}
    assert all(("deca_phase", (("phase", phase),)) in found for phase in phases)
    scraped = yaml.safe_load((DASHBOARD.parents[1] / "prometheus/prometheus.yml").read_text())
    assert re.findall(r'job="([^"]*)"', asked) == [scraped["scrape_configs"][0]["job_name"]]


def series(node: str, instance: str, minutes: str, phase: str) -> list[dict[str, str]]:
    """A node's samples, a minute apart, for promtool: ``stale`` is where its target has gone."""
    of = f'job="deca-node", instance="{instance}:9464"'
    last = {"training": "0", "done": "1"}[phase]
    return [
        {"series": f'deca_node_info{{{of}, run="r", node="{node}"}}', "values": f"1{minutes}"},
        {"series": f'deca_phase{{{of}, phase="done"}}', "values": f"{last}{minutes}"},
        {"series": f'deca_phase{{{of}, phase="serving"}}', "values": f"0{minutes}"},
    ]


@pytest.mark.skipif(PROMTOOL is None, reason="needs the command promtool")
def test_a_node_that_is_gone_is_told_also_where_its_target_is(tmp_path) -> None:
    """Not one that is back at another address, that has finished, or that went half a day ago."""
    (tmp_path / "alerts.yml").write_text(alerts())
    gone = {
        "exp_labels": {"job": "deca-node", "run": "r", "node": "crashed"},
        "exp_annotations": {"summary": "crashed of run r has ended, or cannot be reached"},
    }
    expected = {"34m": [], "37m": [gone], "11h": [gone], "13h": []}
    test = {
        "rule_files": ["alerts.yml"],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [
                    *series("here", "10.0.0.1", "x900", "training"),
                    *series("crashed", "10.0.0.2", "x30 stale", "training"),
                    *series("moved", "10.0.0.3", "x30 stale", "training"),
                    *[
                        {**one, "values": f"_x32 {one['values']}"}
                        for one in series("moved", "10.0.0.4", "x860", "training")
                    ],
                    *series("finished", "10.0.0.5", "x30 stale", "done"),
                ],
                "alert_rule_test": [
                    {"eval_time": time, "alertname": "DecaNodeSilent", "exp_alerts": those}
                    for time, those in expected.items()
                ],
            }
        ],
    }
    (tmp_path / "test.yml").write_text(json.dumps(test))  # JSON is YAML
    ran = subprocess.run(
        [PROMTOOL, "test", "rules", tmp_path / "test.yml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_labels_are_bounded_and_those_of_now(served) -> None:
    """Who exchanged nothing has no edge; who is forgotten leaves no trace."""
    measurements, port = served
    now = status()
    measurements.stands(now)
    peers = {labels for name, labels in scrape(port) if name == "deca_edge_weight"}
    assert peers == {(("peer", "bob"),), (("peer", "carol"),)}
    del now.peers[:]
    measurements.stands(now)
    assert not [name for name, _ in scrape(port) if name.startswith("deca_edge")]


def test_a_node_that_has_done_no_step_makes_no_numbers_up(served) -> None:
    measurements, port = served
    assert not [name for name, _ in scrape(port) if name.startswith("deca")]
    measurements.stands(status())
    names = {name for name, _ in scrape(port)}
    assert "deca_loss" not in names
    assert "deca_node_info" in names


def test_a_name_cannot_break_out_of_its_label(served) -> None:
    measurements, port = served
    now = status()
    now.peers[0].node = 'b"} 1\ndeca_loss 0\n#\\'
    measurements.stands(now)
    assert ("deca_edge_weight", (("peer", 'b"} 1\ndeca_loss 0\n#\\'),)) in scrape(port)


def test_a_loss_that_is_none_is_served_as_one(served) -> None:
    measurements, port = served
    measurements.stands(status())
    measurements.stepped(record(0, loss=float("nan")))
    assert math.isnan(scrape(port)["deca_loss", ()])


def test_a_taken_port_is_said_in_a_line(served) -> None:
    _, port = served
    with pytest.raises(ListenError, match=rf"metrics on 127.0.0.1:{port}: .*set metrics.port"):
        Endpoint("127.0.0.1", port, Measurements(Stands()))
    with pytest.raises(ListenError, match=r"metrics\.host"):
        Endpoint("203.0.113.1", 0, Measurements(Stands()))


def test_a_caller_that_says_nothing_holds_up_nobody_for_long(served, monkeypatch) -> None:
    """The one thread hangs up on it, and on one that never lets the time between two bytes pass."""
    monkeypatch.setattr("deca_node.prometheus.SCRAPE_SECONDS", 1.0)
    measurements, port = served
    measurements.stands(status())
    with socket.create_connection(("127.0.0.1", port)) as slow:
        slow.sendall(b"GET /metrics")
        assert ("deca_degree", ()) in scrape(port)


# the dashboard

_WORD = re.compile(r"(?<![\w$.\"{])(?:deca|process)_\w+")


def test_each_query_of_the_dashboard_names_a_metric_that_exists(served) -> None:
    measurements, port = served
    measurements.stands(status())
    measurements.stepped(record(0))
    exist = {name for name, _ in scrape(port)}
    asked: set[str] = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", []):
            named = set(_WORD.findall(target["expr"]))
            assert named, f"{panel['title']}: asks for nothing"
            assert named <= exist, f"{panel['title']}: {named - exist}"
            asked |= named
    unseen = {name for name in exist if name.startswith("deca")} - asked
    assert not unseen, "measured, but on no panel"


def test_the_dashboard_can_be_imported() -> None:
    """Panels have an id each and their own place, and take the data source from a variable."""
    dashboard = json.loads(DASHBOARD.read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
        assert panel["type"] == "row" or panel["datasource"]["uid"] == "${datasource}"
    assert {v["name"] for v in dashboard["templating"]["list"]} == {"datasource", "run", "node"}
