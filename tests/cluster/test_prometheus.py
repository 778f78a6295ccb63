"""A real Prometheus scrapes real daemons: every panel of the Grafana dashboard has its data."""

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from functools import partial
from pathlib import Path

import pytest

from tests.cluster.daemons import DEADLINE

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
# Of a swarm of two CPUs that nothing goes wrong in there are none.
MAY_BE_EMPTY = ("deca_device_memory_bytes", "deca_refusals_total")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs the command prometheus"),
]


class Prometheus:
    """The server, as the dashboard asks it."""

    def __init__(self, folder, targets):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        settings = folder / "prometheus.yml"
        jobs = [{"job_name": "deca-node", "static_configs": [{"targets": targets}]}]
        # JSON is YAML.
        settings.write_text(
            json.dumps({"global": {"scrape_interval": "1s"}, "scrape_configs": jobs})
        )
        command = ["prometheus", f"--config.file={settings}", f"--storage.tsdb.path={folder}/tsdb"]
        with (folder / "prometheus.log").open("wb") as log:
            self.process = subprocess.Popen(
                [*command, f"--web.listen-address={self.address}"], stdout=log, stderr=log
            )

    def until_ready(self):
        """Returns when it answers queries; while it opens its database it says 503 to them."""
        self._until(self._is_ready, bool, "not ready")

    def _is_ready(self):
        try:
            with urllib.request.urlopen(f"http://{self.address}/-/ready", timeout=60):
                return True
        except urllib.error.HTTPError as error:
            if error.code == 503:
                return False
            raise
        except urllib.error.URLError as error:
            if isinstance(error.reason, ConnectionRefusedError):
                return False
            raise

    def ask(self, expression):
        """The series that an expression has now."""
        query = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(
            f"http://{self.address}/api/v1/query?{query}", timeout=60
        ) as answer:
            return json.load(answer)["data"]["result"]

    def until(self, expression, reached):
        self._until(partial(self.ask, expression), reached, expression)

    def _until(self, ask, reached, about):
        limit = time.monotonic() + DEADLINE
        while not reached(found := ask()):
            assert time.monotonic() < limit, f"{about}: {found}"
            assert self.process.poll() is None
            time.sleep(0.2)  # between two questions to another process


def expressions():
    dashboard = json.loads((DEPLOY / "grafana" / "deca-node.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            text = target["expr"].replace("$__rate_interval", "10s")
            yield panel["title"], re.sub(r"\$(run|node)\b", ".*", text)


def test_every_panel_of_the_dashboard_has_data(pair, tmp_path):
    """Each query of the file answers with both nodes, or with what it makes of them."""
    for daemon in pair:
        daemon.until(lambda status: status.steps_done >= 25)
    targets = [
        next(event["address"] for event in daemon.events() if event["event"] == "metrics")
        for daemon in pair
    ]
    server = Prometheus(tmp_path, [urllib.parse.urlsplit(target).netloc for target in targets])
    try:
        server.until_ready()
        server.until("rate(deca_steps_total[10s]) > 0", lambda found: len(found) == 2)
        empty = [
            (title, text)
            for title, text in expressions()
            if not server.ask(text) and not any(name in text for name in MAY_BE_EMPTY)
        ]
        assert empty == []
        nodes = {each["metric"]["node"] for each in server.ask("deca_node_info")}
        assert nodes == {"alice", "bob"}
    finally:
        server.process.terminate()
        server.process.wait(DEADLINE)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs the command promtool")
def test_prometheus_accepts_its_settings():
    subprocess.run(
        ["promtool", "check", "config", DEPLOY / "prometheus" / "prometheus.yml"],
        check=True,
        capture_output=True,
    )
