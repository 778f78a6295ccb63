"""The benchmarks still run, in small: what they measure is for `make bench` to say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "transport.py --sizes 1 --repeat 1 --no-hivemind",
        "serving.py --repeat 1 --seconds 0.1",
        "early.py --megabytes 1 --rates 0 --repeat 1",
        "wire_formats.py --megabytes 1 --repetitions 1 --steps 2",
    ],
)
def test_a_benchmark_runs_to_its_end(tmp_path, command):
    """And whatever it writes can be read."""
    script, *options = command.split()
    if script in ("transport.py", "serving.py"):
        options += ["--out", str(tmp_path)]
    subprocess.run([sys.executable, BENCH / script, *options], check=True, cwd=tmp_path)
    for written in tmp_path.rglob("*.json"):
        assert json.loads(written.read_text())
