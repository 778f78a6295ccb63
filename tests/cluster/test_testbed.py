"""`deca-node testbed` as a user runs it: processes, an interrupt, a failure."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.cluster.daemons import DEADLINE
from tests.tiny import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "tiny", "llama", layers=2)


@pytest.fixture
def testbed(tmp_path, model):
    """A function that starts a testbed of two nodes in tmp_path/out."""
    rows = [{"text": f"{'abcd'[i % 4]} {i}", "label": "ab"[i % 2]} for i in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = []

    def start(*settings):
        command = [sys.executable, "-m", "deca_node", "testbed", "--nodes", "2"]
        command += ["--train", str(tmp_path / "data.jsonl"), "--test-per-label", "2"]
        command += ["--concentration", "100", "--out", "out"]
        common = [f"model.path={model}", "model.dtype=fp32", "schedule.rounds=1", "node.threads=1"]
        for setting in [*common, *settings]:
            command += ["--set", setting]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        made.append(process)
        return process

    yield start
    for process in made:
        if process.poll() is None:
            process.terminate()  # it ends its nodes
        process.communicate(timeout=DEADLINE)


def test_an_interrupted_testbed_is_finished_by_the_same_command(testbed, tmp_path):
    """Ctrl-C in the middle is 130 with all nodes ended; then come results, models and a picture."""
    out = tmp_path / "out"
    first = testbed("schedule.steps=300")
    histories = [out / f"node-{number}" / "history.jsonl" for number in range(2)]
    limit = time.monotonic() + DEADLINE
    while not all(path.exists() and path.stat().st_size > 0 for path in histories):
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < limit
        time.sleep(0.05)  # between two looks at other processes' files
    first.send_signal(signal.SIGINT)
    said, errors = first.communicate(timeout=DEADLINE)
    assert first.returncode == 130, errors
    assert "the same command resumes" in said
    assert not (out / "results.json").exists()
    done = [len(path.read_text().splitlines()) for path in histories]
    assert all(0 < count < 600 for count in done)

    again = testbed("schedule.steps=300")
    said, errors = again.communicate(timeout=DEADLINE)
    assert again.returncode == 0, said + errors
    shown = ["results.json", "results.png", "node-0/model", "node-1/model"]
    assert said.splitlines()[-4:] == [f"out/{name}" for name in shown]
    rows = [[json.loads(line) for line in path.read_text().splitlines()] for path in histories]
    taken = [[(row["visit"], row["step"]) for row in each] for each in rows]
    # Who was stopped a few steps behind the other leaves it the rest of that visit.
    assert max(map(len, taken)) == 600
    for each, before in zip(taken, done, strict=True):
        assert each == sorted(set(each))
        assert len(each) >= before + 300
        assert each[-1] == (1, 299)
    results = json.loads((out / "results.json").read_text())
    assert [node["node"] for node in results["nodes"]] == ["node-0", "node-1"]
    for node in results["nodes"]:
        assert set(node["label_counts"]) == {"a", "b"}
        assert 0 <= node["before"]["accuracy"] <= 1
        assert 0 <= node["after"]["macro_f1"] <= 1
        assert min(node["bytes_sent"], node["bytes_received"]) > 0
    assert results["settings"]["settings"]["schedule"]["steps"] == 300
    assert results["wall_seconds"] > 0
    for number in range(2):
        assert (out / f"node-{number}/model/model.safetensors").stat().st_size > 0


def test_a_failed_node_fails_the_testbed_in_one_line(testbed, tmp_path):
    """Exit 10 with the node's own words; no node has begun, so the command can be corrected."""
    failed = testbed("schedule.steps=1", f"model.path={tmp_path / 'absent'}")
    said, errors = failed.communicate(timeout=DEADLINE)
    assert failed.returncode == 10, said + errors
    assert errors.count("\n") == 1
    assert errors.startswith("deca-node: error: node-")
    assert "failed (exit code 5)" in errors
    assert str(tmp_path / "absent") in errors
    assert not list((tmp_path / "out").glob("node-*/run.json"))
