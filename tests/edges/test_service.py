"""The systemd unit of `deca-node install-service`, as systemd itself reads it."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deca_node import errors
from deca_node.cli import app
from deca_node.cli_service import unit
from deca_node.config import load

ANALYZE = shutil.which("systemd-analyze")


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "node.toml"
    path.write_text('[model]\npath = "model"\n[data]\ntrain = "train.jsonl"\n')
    return path


def printed(*arguments):
    result = CliRunner().invoke(app, ["install-service", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def values(text, key):
    return [line.partition("=")[2] for line in text.splitlines() if line.startswith(f"{key}=")]


def test_it_starts_this_program_with_these_settings(config):
    """By absolute paths, as the user and in the folder of the unit's name."""
    text = printed("--config", config, "--user", "trainer", "--name", "deca-7")
    (start,) = values(text, "ExecStart")
    program, *arguments = start.split()
    assert Path(program).name == "deca-node"
    assert subprocess.run([program, "--version"], capture_output=True, check=True).stdout
    assert arguments == ["start", "--config", str(config)]
    assert values(text, "User") == ["trainer"]
    assert values(text, "StateDirectory") == ["deca-7"]
    assert values(text, "Environment") == ["DECA_MODEL__CACHE=/var/cache/deca-7"]


def test_what_must_be_mended_first_is_not_tried_again(config):
    """Settings, data, model, output folder; a lost device or a taken port may come back."""
    (codes,) = values(printed("--config", config), "RestartPreventExitStatus")
    hopeless = {errors.ConfigError, errors.DataError, errors.ModelError, errors.OutputError}
    hopeless.add(errors.TrustError)
    assert set(codes.split()) == {str(error.exit_code) for error in hopeless}
    assert str(errors.DeviceError.exit_code) not in codes.split()


def test_folders_elsewhere_are_opened_for_writing(config, tmp_path):
    """And named when they are not there: systemd would refuse to start."""
    with config.open("a") as file:
        file.write('[node]\noutput = "my out"\n[tensorboard]\nfolder = "curves"\n')
    result = CliRunner().invoke(app, ["install-service", "--config", str(config)])
    assert values(result.stdout, "ReadWritePaths") == [
        f'"{tmp_path}/my out"',
        f"{tmp_path}/curves",
    ]
    assert f"install -d -o deca-node '{tmp_path}/my out'\n" in result.stderr


def test_paths_that_lead_up_and_down_are_plain(config, tmp_path):
    """systemd ignores ReadWritePaths with .. in them, and the node could not write."""
    up = tmp_path / "sub" / ".."
    with config.open("a") as file:
        file.write(f'[node]\noutput = "../{tmp_path.name}/out"\n[trust]\nfolder = "{up}/keys"\n')
    text = printed("--config", up / config.name)
    assert values(text, "ReadWritePaths") == [f"{tmp_path}/out", f"{tmp_path}/keys"]
    (start,) = values(text, "ExecStart")
    assert start.split()[-1] == str(config)


def test_odd_paths_are_quoted(config):
    """systemd reads %, $, quotes and blanks in its own way."""
    settings = load(config)
    text = unit(settings, Path('/a b/100%$"x"\\y'), Path("/bin/deca-node"), "u", "n")
    assert values(text, "ExecStart") == ['/bin/deca-node start --config "/a b/100%%$$\\"x\\"\\\\y"']


def test_only_command_lines_have_dollars_doubled(config):
    """In other lines systemd fills in no variables: $$ would be another folder."""
    with config.open("a") as file:
        file.write('[node]\noutput = "/srv/a$b/50%"\n')
    assert values(printed("--config", config), "ReadWritePaths") == ["/srv/a$b/50%%"]


@pytest.mark.parametrize(
    ("option", "word"),
    [
        ("--name", "a b"),
        ("--name", ""),
        ("--name", ".."),
        ("--name", "a/b"),
        ("--name", "a%i"),
        ("--user", "deca\nExecStartPre=/bin/true"),
        ("--user", "deca-node\n"),
        ("--user", "a b"),
    ],
)
def test_words_that_would_be_several_are_refused(config, option, word):
    result = CliRunner().invoke(app, ["install-service", "--config", str(config), option, word])
    assert isinstance(result.exception, errors.ConfigError)
    assert str(result.exception).startswith(f"{option} {word!r} cannot be used in a unit")
    assert result.stdout == ""


def test_a_path_of_several_lines_is_refused(config):
    with config.open("a") as file:
        file.write('[node]\noutput = "/srv/a\\nExecStartPre=/bin/true"\n')
    result = CliRunner().invoke(app, ["install-service", "--config", str(config)])
    assert isinstance(result.exception, errors.ConfigError)
    assert result.stdout == ""


def test_it_is_started_again_however_often_it_failed(config):
    """A boot without network ends each start at once, with exit code 6."""
    text = printed("--config", config)
    assert values(text, "StartLimitIntervalSec") == ["0"]
    assert values(text, "Restart") == ["on-failure"]
    (codes,) = values(text, "RestartPreventExitStatus")
    assert str(errors.ListenError.exit_code) not in codes.split()


def test_settings_that_cannot_work_print_no_unit(tmp_path):
    """They end in a ConfigError, of one line."""
    result = CliRunner().invoke(app, ["install-service", "--config", str(tmp_path / "none.toml")])
    assert isinstance(result.exception, errors.ConfigError)
    assert result.stdout == ""


@pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not there to read the unit")
def test_systemd_takes_it_and_finds_it_safe(config, tmp_path):
    """No unknown or ill-typed line; its exposure is below that of most of a system's services."""
    path = tmp_path / "deca-node.service"
    path.write_text(printed("--config", config))
    checked = subprocess.run(
        [ANALYZE, "verify", "--man=no", str(path)], capture_output=True, text=True, check=False
    )
    ours = [line for line in checked.stderr.splitlines() if "deca-node.service" in line]
    assert ours == [], checked.stderr
    assert checked.returncode == 0, checked.stderr
    judged = subprocess.run(
        [ANALYZE, "security", "--offline=yes", "--no-pager", str(path)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    exposure = re.search(r"Overall exposure level for deca-node\.service: ([0-9.]+)", judged)
    assert exposure is not None, judged
    assert float(exposure[1]) < 3.0
