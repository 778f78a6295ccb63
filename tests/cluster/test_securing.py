"""The verbs of `deca-node swarm` and real daemons, as in docs/securing.md."""

import json
import os
import subprocess
import sys
import uuid

import pytest

from deca_node.pb import node_pb2 as pb
from tests.cluster.daemons import DEADLINE, Daemon, end_all
from tests.tiny import make_model

pytestmark = pytest.mark.slow


class Machine:
    """Stands for a machine: its own folder of settings."""

    def __init__(self, folder):
        self.home = folder
        self.env = {**os.environ, "XDG_CONFIG_HOME": str(folder), "COLUMNS": "200"}

    def begin(self, *arguments):
        return subprocess.Popen(
            [sys.executable, "-m", "deca_node", *arguments],
            env=self.env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, *arguments, code=0):
        process = self.begin(*arguments)
        out, err = process.communicate(timeout=DEADLINE)
        assert process.returncode == code, err
        assert "Traceback" not in err
        return out + err


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "tiny", "llama")


@pytest.fixture
def machines(tmp_path):
    return Machine(tmp_path / "one"), Machine(tmp_path / "two")


def test_from_an_authority_to_a_revocation(machines, model, tmp_path):
    """Made, invited, joined, trained together under TLS, put out."""
    one, two = machines
    run = f"safe-{uuid.uuid4().hex[:8]}"
    # Without certificates a node does not listen on the network.
    data = tmp_path / "data.jsonl"
    rows = [{"text": f"{'abcd'[i % 4]} {i}", "label": "ab"[i % 2]} for i in range(24)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = [
        f"run.name={run}",
        f"model.path={model}",
        "model.dtype=fp32",
        f"data.train={data}",
        "node.host=0.0.0.0",
        "network.zeroconf=false",
        "schedule.rounds=1000",
        "schedule.steps=20",
    ]
    bare = [part for setting in common for part in ("--set", setting)]
    said = two.run("start", *bare, "--set", f"node.output={tmp_path / 'bare'}", code=12)
    assert "swarm join TOKEN" in said

    one.run("swarm", "init", "--run", run, "--node", "alice")
    assert "already has an authority" in one.run("swarm", "init", "--run", run, code=12)
    inviter = one.begin("swarm", "invite", "--run", run, "--ttl", "5m")
    command = inviter.stdout.readline().split()
    assert command[:3] == ["deca-node", "swarm", "join"]
    two.run(*command[1:], "--node", "bob")
    assert inviter.wait(DEADLINE) == 0
    assert "bob has joined" in inviter.stderr.read()
    assert "no inviter" in two.run(*command[1:], "--node", "carol", code=12)

    folder = {m: m.home / "deca-node" / run for m in machines}
    alice = Daemon(
        tmp_path, "alice", [*common, f"trust.folder={folder[one]}", "run.start_when=2"]
    ).start()
    bob = None
    try:
        port = alice.until(lambda s: s.phase == pb.PHASE_WAITING).address.rpartition(":")[2]
        bob = Daemon(
            tmp_path,
            "bob",
            [
                *common,
                f"trust.folder={folder[two]}",
                "run.start_when=2",
                f'network.static_peers=["127.0.0.1:{port}"]',
            ],
        ).start()
        for daemon, other in ((alice, "bob"), (bob, "alice")):
            status = daemon.until(
                lambda s, other=other: s.steps_done > 5 and [p.node for p in s.peers] == [other]
            )
            assert status.security.startswith("TLS 1.3")
            assert status.degree == 1
        # A person with the operator's certificate, one with a node's, one with none.
        for machine in machines:
            shown = json.loads(machine.run("status", f"127.0.0.1:{port}", "--json"))
            assert shown["node"] == "alice"
        nobody = Machine(tmp_path / "nobody")
        nobody.env["XDG_RUNTIME_DIR"] = str(tmp_path)  # does not know this machine's nodes
        said = nobody.run("status", f"127.0.0.1:{port}", code=12)
        assert f"node of run {run!r}" in said

        one.run("swarm", "revoke", "bob", "--run", run)
        alice.until(lambda s: s.degree == 0 and list(s.revoked) == ["bob"])
        status = bob.until(lambda s: s.degree == 0)
        steps = alice.status().steps_done
        status = alice.until(lambda s: s.steps_done > steps + 20)
        assert [p.state for p in status.peers] == ["gone"]
        assert status.refusals["revoked"] > 0 or status.peers[0].detail.startswith("revoked")
        table = one.run("swarm", "show", "--run", run)
        assert "revoked" in table
    finally:
        end_all([daemon for daemon in (alice, bob) if daemon is not None])
