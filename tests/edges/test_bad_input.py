"""`deca-node start` with bad input: one line that names the culprit, its exit code, no traces."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess

import pytest
import torch

from deca_node import cli
from deca_node.standing import Standing
from tests.tiny import make_model

WRITABLE = "set node.output to another folder that can be written"
ROWS = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(8)]


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("bad") / "model", "llama", layers=2)


@pytest.fixture
def start(tmp_path, model, capsys):
    """Runs `start` on good settings with some replaced; returns exit code and error's line."""
    (tmp_path / "train.jsonl").write_text(lines(*ROWS))

    def run(*changes):
        settings = [
            "run.start_when=1",
            "node.host=127.0.0.1",
            "node.port=0",
            f"node.output={tmp_path / 'out'}",
            f"model.path={model}",
            "model.dtype=fp32",
            f"data.train={tmp_path / 'train.jsonl'}",
            "network.zeroconf=false",
            "schedule.rounds=1",
            "schedule.steps=1",
            *changes,
        ]
        with pytest.raises(SystemExit) as caught:
            cli.main(["start", *(word for s in settings for word in ("--set", s))])
        log = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
        run.log = log
        errors = [line for line in log if "exit_code" in line]
        assert errors == log[-1:] if caught.value.code else not errors
        assert all(line["exit_code"] == caught.value.code for line in errors)
        return caught.value.code or 0, "".join(line["event"] for line in errors)

    return run


def test_good_input_is_good(start, tmp_path):
    """The settings that the other tests spoil do work."""
    assert start() == (0, "")
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lines(*ROWS) + "{broken\n", "train.jsonl, line 9"),
        (lines(*ROWS, {"text": "x"}), "label"),
        ("", "no rows"),
        (lines(*ROWS, ["a", "list"]), "line 9"),
    ],
)
def test_broken_data_names_file_and_line(start, tmp_path, content, words):
    """Exit 4, and no output folder: the corrected command starts afresh."""
    (tmp_path / "train.jsonl").write_text(content)
    code, error = start()
    assert code == 4
    assert words in error
    assert "train.jsonl" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ("data.train=/absent.jsonl", 4, "/absent.jsonl: no such file"),
        ("data.labels={a='a'}", 4, "'b' is not one of: a; add it to data.labels"),
        ("model.path=/absent", 5, "/absent"),
        ("node.device=cuda", 7, 'node.device = "cpu"'),
        ("node.host=203.0.113.1", 6, "203.0.113.1"),
        ("data.template='{body}'", 4, "body"),
        ("optimizer.bma=sometimes", 2, "optimizer.bma"),
        ("schedule.rounds=0", 2, "schedule.rounds"),
        (f"node.output={__file__}", 8, f"{__file__}: File exists; {WRITABLE}"),
        (f"node.output={__file__}/out", 8, f"Not a directory; {WRITABLE}"),
        ("node.output=/proc/out", 8, f"/proc/out: no folder can be created there; {WRITABLE}"),
    ],
)
def test_each_culprit_is_named(start, change, code, words):
    """Wrong settings, paths, labels and devices have their own exit code and line."""
    if "cuda" in change and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    found, error = start(change, "trust.insecure=true")
    assert found == code, error
    assert words in error


def test_a_node_for_others_without_a_certificate_is_told_where_to_get_one(start, monkeypatch):
    """Exit 12, before anything is loaded; nor may keys lie where models are."""
    monkeypatch.setenv("XDG_CONFIG_HOME", "/absent")
    found, error = start("node.host=0.0.0.0")
    assert found == 12, error
    assert "/absent/deca-node/" in error
    assert "deca-node swarm join TOKEN" in error
    found, error = start(
        "node.host=0.0.0.0", "node.output=/absent/out", "trust.folder=/absent/out/t"
    )
    assert found == 2, error
    assert "trust.folder" in error


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (("run.method=fedavg",), 'run.method = "fedavg"'),
        (("lora.rank=4",), "lora.rank = 4: a setting of dec-lora, decaf"),
        (("lora.ranks=4",), "lora.ranks: unknown setting; did you mean 'lora.rank'?"),
        (("schedule.layers_per_block=3",), "schedule.layers_per_block = 3: the model has 2 layers"),
        (("run.method=dec-lora", 'lora.targets=["x_proj"]'), "lora.targets: 'x_proj' matches no"),
        (("run.method=decaf", "lora.rank=64"), "lora.rank = 64: model.layers.0.self_attn.q_proj"),
    ],
)
def test_a_method_that_does_not_go_with_its_settings_is_named(start, tmp_path, changes, words):
    """Exit 2, whether the settings or the model show it, and no output folder."""
    if "dec" in changes[0] and importlib.util.find_spec("peft") is None:
        words = "pip install 'deca-node[lora]'"
    found, error = start(*changes)
    assert found == 2, error
    assert words in error
    assert not (tmp_path / "out").exists()


def test_a_taken_port_is_named(start):
    """Exit 6, with the port and the setting to change."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, error = start(f"node.port={port}")
    assert code == 6
    assert str(port) in error
    assert "node.port" in error


@pytest.mark.parametrize("interface", ["203.0.113.9", "eth0"])
def test_an_interface_that_is_not_there_is_named_before_the_model_is_read(start, interface):
    network = ["network.zeroconf=true", f'network.interfaces=["127.0.0.1", "{interface}"]']
    code, error = start("model.path=/absent", *network)
    assert code == 6
    where = "is not an IP address of this machine; "
    assert error.startswith(f"network.interfaces: {interface} {where}")


def test_a_model_that_is_not_causal_is_named(start, model, tmp_path):
    """Exit 5 for an encoder, naming the folder."""
    other = shutil.copytree(model, tmp_path / "bert")
    tree = json.loads((other / "config.json").read_text())
    tree.update(architectures=["BertForMaskedLM"], model_type="bert")
    (other / "config.json").write_text(json.dumps(tree))
    code, error = start(f"model.path={other}")
    assert code == 5
    assert str(other) in error


def test_the_output_of_another_run_is_refused(start, tmp_path):
    """Exit 8, naming what differs; the finished model is as it was."""
    assert start()[0] == 0
    before = (tmp_path / "out" / "model" / "model.safetensors").read_bytes()
    code, error = start("optimizer.learning_rate=0.5")
    assert code == 8
    assert "optimizer.learning_rate" in error
    assert (tmp_path / "out" / "model" / "model.safetensors").read_bytes() == before


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_costs_checkpoints_but_not_the_run(start, small_disk, monkeypatch):
    """The run goes on without its checkpoints and says so; its model waits until there is room."""
    monkeypatch.setattr("deca_node.node.ROOM_SECONDS", 0.05)
    filler = small_disk / "filler"
    filler.write_bytes(b"\0" * (4_194_304 - 76_000))
    warn = Standing.warn

    def make_room_when_asked(standing, text, about=""):
        warn(standing, text, about)
        if text.startswith("waiting for room to finish"):
            filler.unlink(missing_ok=True)

    monkeypatch.setattr(Standing, "warn", make_room_when_asked)
    code, error = start(f"node.output={small_disk / 'out'}", "schedule.steps=3")
    assert code == 0, error
    said = [line["event"] for line in start.log if "no space left" in line["event"]]
    assert any(line.startswith("not saved") for line in said), said
    assert any(line.startswith("waiting for room") for line in said), said
    assert (small_disk / "out" / "model" / "model.safetensors").exists()
