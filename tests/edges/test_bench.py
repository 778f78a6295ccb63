"""Benchmarks that take seconds in small still run: what they measure is for `make bench` to say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


def bench(folder, script, *options):
    """What it prints."""
    command = [sys.executable, BENCH / script, *options]
    return subprocess.run(command, check=True, cwd=folder, stdout=subprocess.PIPE, text=True).stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "key"),
    [
        ("transport.py --sizes 1 --repeat 1 --no-hivemind", "results"),
        ("serving.py --repeat 1 --seconds 0.1", "serving"),
    ],
)
def test_a_benchmark_writes_what_it_measured(tmp_path, command, key):
    """With every case that it is about."""
    script, *options = command.split()
    bench(tmp_path, script, *options, "--out", tmp_path)
    assert json.loads((tmp_path / script).with_suffix(".json").read_text())[key]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "early.py --megabytes 1 --rates 0 --repeat 1",
        "wire_formats.py --megabytes 1 --repetitions 1 --steps 2",
    ],
)
def test_a_benchmark_prints_what_it_measured(tmp_path, command):
    """As JSON, maybe with a table below it."""
    printed = bench(tmp_path, *command.split())
    assert json.JSONDecoder().raw_decode(printed[printed.index("{") :])[0]
