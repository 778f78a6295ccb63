"""The command line: what it writes, what it says, and its exit codes."""

import io
import json
import logging
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from unittest.mock import Mock

import pytest
import structlog
import typer

from deca_node import cli, config, errors, logs, registry, status, template
from deca_node.pb import node_pb2 as pb
from deca_node.transport.server import GrpcTransport
from tests.edges.test_registry import _own_folder  # noqa: F401 - nodes of this machine stay out


def _run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert isinstance(ended.value.code, int)
    return ended.value.code


# what it prints


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "arguments", [["--version"], ["peers", "--help"], ["init", "OUT"]], ids=str
)
def test_a_full_disk_under_what_it_prints_is_one_line(tmp_path: Path, arguments: list[str]) -> None:
    arguments = [str(tmp_path / "node.toml") if a == "OUT" else a for a in arguments]
    with Path("/dev/full").open("w") as full:
        ran = subprocess.run(
            [sys.executable, "-m", "deca_node", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert ran.returncode == errors.DiskFullError.exit_code
    assert ran.stderr.startswith("deca-node: error: what this prints: no space left")
    assert ran.stderr.count("\n") == 1


def test_a_letter_that_the_locale_does_not_have_ends_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As of ISO 8859-1, which has no long dash, arrow or ellipsis."""
    printed = io.TextIOWrapper(io.BytesIO(), encoding="iso-8859-1")
    monkeypatch.setattr(sys, "stdout", printed)

    def verb(*_: object, **__: object) -> None:
        status.make_console().print("ä — b")
        typer.echo("0.5 → 0.9")

    monkeypatch.setattr(cli, "app", verb)
    assert _run("status") == 0
    assert printed.buffer.getvalue().decode("iso-8859-1") == "ä ? b\n0.5 ? 0.9\n"


# init


def test_init_writes_a_file_that_needs_only_its_gaps_filled(tmp_path: Path) -> None:
    """It parses, is accepted as it is, and shows every setting there is."""
    path = tmp_path / "node.toml"
    assert _run("init", str(path)) == 0
    settings = config.load(path)
    assert settings.model.path == tmp_path / "path/to/model"
    assert settings.optimizer == config.OptimizerSettings()
    text = path.read_text(encoding="utf-8")
    section = ""
    shown = set()
    for line in text.splitlines():
        if heading := re.fullmatch(r"\[(\w+)\]", line):
            section = heading[1]
        elif setting := re.match(r"(?:# )?(\w+) = ", line):
            shown.add(f"{section}.{setting[1]}")
    assert shown == set(config.KEYS)


def test_every_line_of_the_file_can_be_uncommented(tmp_path: Path) -> None:
    """What is shown as a default is one; an example is a value that is accepted."""
    path = tmp_path / "node.toml"
    path.write_text(re.sub(r"(?m)^# (\w+ = )", r"\1", template.commented()), encoding="utf-8")
    settings = config.load(path)
    assert settings.schedule == config.ScheduleSettings()
    assert settings.network.heartbeat == 2.0


def test_every_setting_is_described() -> None:
    """Whoever adds a setting says what it is."""
    for section in config.Settings.model_fields.values():
        for name, field in section.annotation.model_fields.items():  # type: ignore[union-attr]
            assert field.description, name


def test_init_does_not_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Unless it is told to."""
    path = tmp_path / "node.toml"
    path.write_text("precious")
    assert _run("init", str(path)) == errors.OutputError.exit_code
    assert path.read_text() == "precious"
    assert capsys.readouterr().err == (
        f"deca-node: error: {path}: already exists; --force overwrites it\n"
    )
    assert _run("init", str(path), "--force") == 0
    assert tomllib.loads(path.read_text())["run"]


def test_a_document_gives_the_same_settings_again(tmp_path: Path) -> None:
    """Quotes, line ends, odd label names and nothing at all survive."""
    settings = config.load(
        None,
        [
            "model.path=/m",
            "data.train=/d",
            r'data.labels={"a b" = "x\"y", "é\u007f" = "z"}',
            "node.output=/o",
            'data.template="{text}\\n\\"Label\\":"',
            'topology.kind="explicit"',
            'topology.edges=[["a", "b"]]',
            "optimizer.adam_eps=1e-12",
        ],
    )
    path = tmp_path / "node.toml"
    path.write_text(template.document(settings), encoding="utf-8")
    assert config.load(path).model_dump() == settings.model_dump()


# errors


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["status", "127.0.0.1:99999"], 2, "'127.0.0.1:99999' is not HOST:PORT"),
        (["peers", "foo"], 3, "foo: no node of that name runs on this machine"),
        (["peers", "foo:bar"], 2, "'foo:bar' is not HOST:PORT"),
        (["status", "127.0.0.1:9"], 3, "no deca-node answers at 127.0.0.1:9"),
        (["status"], 3, "no node runs on this machine"),
        (["peers", "127.0.0.1:9"], 3, "no deca-node answers at 127.0.0.1:9"),
        (["partition", "absent.jsonl", "out", "-n", "2"], 4, "absent.jsonl: no such file"),
        (["init", "absent/node.toml"], 8, "in a folder that exists and can be written"),
        (["testbed"], 2, "give either --train FILE or --shards DIR"),
    ],
)
def test_an_error_is_one_line_and_its_own_exit_code(
    arguments: list[str],
    code: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No traceback, nothing on stdout."""
    monkeypatch.chdir(tmp_path)
    assert _run(*arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("deca-node: error: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err
    assert list(tmp_path.glob("*.*")) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "schedule.stepz=1"], "did you mean 'schedule.steps'?"),
        (["--config", "absent.toml"], "absent.toml: no such file"),
        ([], "'model.path' is missing"),
    ],
)
def test_a_daemons_error_is_a_line_of_its_log(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """JSON like all others where nobody is looking, plain on a terminal, raised when asked for."""
    monkeypatch.chdir(tmp_path)
    assert _run("start", *arguments) == 2
    captured = capsys.readouterr()
    line = json.loads(captured.err)
    assert words in line["event"]
    assert (line["level"], line["exit_code"]) == ("error", 2)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert _run("start", *arguments) == 2
    error = capsys.readouterr().err
    assert error == f"deca-node: error: {line['event']}\n"
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.ConfigError):
        cli.main(["--traceback", "start", *arguments])


def test_traceback_is_shown_when_asked_for() -> None:
    with pytest.raises(errors.UnreachableError):
        cli.main(["--traceback", "status", "127.0.0.1:9"])


def test_a_defect_is_logged_with_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And exits with 1, an interrupt with 130."""

    def broken() -> None:
        raise ZeroDivisionError("boom")

    monkeypatch.setattr(registry, "local_nodes", broken)
    assert _run("status") == 1
    line = json.loads(capsys.readouterr().err)
    assert line["level"] == "error"
    assert "ZeroDivisionError: boom" in line["exception"]

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(registry, "local_nodes", interrupted)
    assert _run("status") == 130


def test_wrong_usage_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("bogus") == 2
    assert "bogus" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("--version") == 0
    assert re.fullmatch(r"deca-node \d+\.\d+\.\d+\n", capsys.readouterr().out)


# verbs


def test_partition_prints_who_has_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table's numbers are those of the files."""
    source = tmp_path / "data.jsonl"
    rows = [{"text": str(number), "kind": "ab"[number % 2]} for number in range(40)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "shards"
    options = ["-n", "2", "--label-field", "kind", "--test-per-label", "5"]
    assert _run("partition", str(source), str(out), *options) == 0
    header, *lines, last = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert last[-2:] == ["and", "test.jsonl"]
    assert header == ["node", "a", "b", "rows"]
    for number in range(2):
        found = [json.loads(line)["kind"] for line in (out / f"node-{number}.jsonl").open()]
        counts = [found.count("a"), found.count("b"), len(found)]
        assert lines[number] == [f"node-{number}", *map(str, counts)]
    assert len((out / "test.jsonl").read_text().splitlines()) == 10


@pytest.mark.parametrize(
    "verb", [["partition", "in", "out", "-n", "2"], ["testbed", "--train", "x"]]
)
@pytest.mark.parametrize("concentration", ["0", "-1", "nan", "inf"])
def test_a_concentration_that_is_none_is_wrong_usage(verb: list[str], concentration: str) -> None:
    """The data is not blamed for it."""
    assert _run(*verb, "-a", concentration) == 2


def test_json_has_one_shape(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With an address a node's own, without one a list, were it of a single node."""
    now = pb.NodeStatus(run="bbc", node="alice")
    now.peers.add(node="bob")

    async def answer(address: str, timeout: float, credentials: object) -> pb.NodeStatus:
        return now

    entry = registry.Entry("192.0.2.1:7430", "bbc", "alice", 1)
    monkeypatch.setattr(cli, "ask_status", answer)
    monkeypatch.setattr(registry, "local_nodes", lambda: [entry])
    for verb in ("status", "peers"):
        assert _run(verb, "192.0.2.1:7430", "--json") == 0
        assert _run(verb, "alice", "--json") == 0
        assert _run(verb, "--json") == 0
    printed = map(json.loads, capsys.readouterr().out.splitlines())
    node, by_name, nodes, peers, peers_by_name, all_peers = printed
    assert node == by_name
    assert peers == peers_by_name
    assert [node] == nodes
    assert node["node"] == "alice"
    assert peers[0]["node"] == "bob"
    assert all_peers == [{"run": "bbc", "node": "alice", "peers": peers}]


def test_two_nodes_of_one_name_are_two_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told apart by their addresses: that there are two may be what is wrong."""
    addresses = ["127.0.0.1:7430", "127.0.0.1:7431"]

    async def answer(asked: list[str], *_: object) -> list[pb.NodeStatus]:
        return [pb.NodeStatus(run="bbc", node="alice", address=each) for each in asked]

    entries = [registry.Entry(each, "bbc", "alice", 1) for each in addresses]
    monkeypatch.setattr(cli, "ask_all", answer)
    monkeypatch.setattr(registry, "local_nodes", lambda: entries)
    assert _run("status") == 0
    _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split()[:2] for row in rows] == [["alice", each] for each in addresses]


async def test_something_else_that_speaks_grpc_is_no_node() -> None:
    """A server without our service is told apart from a node in one line."""
    transport = GrpcTransport("127.0.0.1", 0)
    port = await transport.listen(Mock(), None)
    try:
        with pytest.raises(errors.UnreachableError, match=f"127.0.0.1:{port}"):
            await cli._ask([f"127.0.0.1:{port}"])
    finally:
        await transport.close(0)


@pytest.mark.parametrize("verb", ["--help", "status"])
def test_light_verbs_do_not_load_torch(verb: str) -> None:
    """They must answer at once."""
    script = (
        "import sys; from deca_node.cli import main\n"
        f"try: main([{verb!r}])\n"
        "except SystemExit: print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


# logs


def test_logs_are_json_lines_with_what_is_bound(capsys: pytest.CaptureFixture[str]) -> None:
    """The program's lines and a library's alike; a library's small talk is left out."""
    logs.configure(human=False)
    logs.bind(node="alice", run="bbc")
    logs.bind(round=1, block=3)
    structlog.get_logger().info("visit", weight=0.5, step=7)
    structlog.get_logger().debug("unseen")
    logging.getLogger("a.library").warning("odd packet from %s", "bob")
    logging.getLogger("a.library").info("small talk")
    own, foreign = map(json.loads, capsys.readouterr().err.splitlines())
    bound = {"node": "alice", "run": "bbc", "round": 1, "block": 3}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+Z", own.pop("time"))
    assert own == {"level": "info", "event": "visit", **bound, "step": 7, "weight": 0.5}
    del foreign["time"]
    assert foreign == {"level": "warning", "event": "odd packet from bob", **bound}


def test_logs_for_people_are_short_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """They go through the console that a progress bar is drawn on."""
    logs.configure(human=True)
    with logs.console.capture() as captured:
        structlog.get_logger().warning("late", peer="[bob]")
    assert re.fullmatch(r"\d\d:\d\d:\d\d \[warning *\] late +peer=\[bob\]\n", captured.get())
