"""The verbs of `deca-node swarm` that need no network, as docs/securing.md has them."""

import errno
import itertools
import json
import re
import shlex
from pathlib import Path

import pytest

from deca_node import cli, cli_swarm, discovery, keyring, pairing
from deca_node.errors import PeerUnavailable
from deca_node.identity import new_key
from deca_node.keyring import Keyring

PAGE = Path(__file__).parents[2] / "docs" / "securing.md"


@pytest.fixture
def say(tmp_path, monkeypatch, capsys):
    """Runs a command line; its exit code, and what it printed."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)

    def run(line):
        with pytest.raises(SystemExit) as caught:
            cli.main(shlex.split(line)[1:])
        captured = capsys.readouterr()
        return caught.value.code, captured.out + captured.err

    return run


def test_the_pages_commands_do_what_the_page_says(say, tmp_path):
    """Each that needs nobody else is typed in, in the page's order."""
    typed = 0
    lines = PAGE.read_text().splitlines()
    for line, after in itertools.pairwise(lines):
        found = re.match(r"\$ (deca-node swarm (init|issue|renew|revoke|show) .*)", line)
        if found is None:
            continue
        code, said = say(found[1])
        assert code == 0, said
        typed += 1
        if found[2] in ("issue", "revoke"):
            assert said.startswith(after)
    assert typed >= 4
    assert {path.name for path in (tmp_path / "trust-carol").rglob("*.*")} >= {
        *("authority.pem", "carol.pem", "carol.key", "revoked.json")
    }
    assert not (tmp_path / "trust-carol" / "authority.key").exists()


def test_the_folder_as_json(say):
    """For scripts: who, until when, in which state."""
    assert say("deca-node swarm init --run r --node a --days 1")[0] == 0
    assert say("deca-node swarm issue b --to elsewhere --run r")[0] == 0
    assert say("deca-node swarm revoke b --run r")[0] == 0
    tree = json.loads(say("deca-node swarm show --run r --json")[1])
    rows = {row["node"]: row for row in tree["certificates"]}
    assert set(rows) == {"(operator)", "a", "b"}
    assert (rows["a"]["here"], rows["a"]["state"], rows["a"]["days"]) == (True, "good", 1)
    assert (rows["b"]["here"], rows["b"]["revoked"]) == (False, True)
    assert (tree["run"], tree["authority_key"], tree["revoked"]) == ("r", True, ["b"])


@pytest.mark.parametrize(
    ("owner", "other", "file", "remedy"),
    [
        ("a", "(operator)", "keys/nodes/a", "join"),
        ("(operator)", "a", "keys/operator", r"copy operator\.pem and operator\.key from"),
    ],
)
@pytest.mark.parametrize("kind", ["damaged", "gone", "another's", "damaged certificate"])
def test_what_cannot_be_used_is_not_shown_as_good(say, kind, owner, other, file, remedy):
    """The line says which file is wrong and what helps; the others are shown as they are."""
    assert say("deca-node swarm init --run r --node a --trust keys")[0] == 0
    key = Path(f"{file}.key")
    if kind == "gone":
        key.unlink()
    elif kind == "damaged certificate":
        Path(f"{file}.pem").write_bytes(b"no certificate")
    else:
        key.write_bytes(b"no key" if kind == "damaged" else new_key())
    code, said = say("deca-node swarm show --run r --trust keys")
    assert code == 0
    assert re.search(rf"^{re.escape(owner)} +yes .* unusable", said, re.MULTILINE)
    assert re.search(rf"^{re.escape(other)} +yes .* good", said, re.MULTILINE)
    assert re.search(rf"^{file}\.(key|pem): .*; .*{remedy}", said, re.MULTILINE)
    tree = json.loads(say("deca-node swarm show --run r --trust keys --json")[1])
    problems = {row["node"]: row["problem"] for row in tree["certificates"]}
    assert problems[owner].startswith(f"{file}.")
    assert not problems[other]


def test_a_damaged_copy_of_what_was_issued_stops_nothing(say):
    """It is shown with its remedy, the name stays taken, and the others go on."""
    assert say("deca-node swarm init --run r --node a --trust keys")[0] == 0
    assert say("deca-node swarm issue b --to elsewhere --run r --trust keys")[0] == 0
    Path("keys/issued/b.pem").write_bytes(b"no certificate")
    code, said = say("deca-node swarm show --run r --trust keys")
    assert code == 0
    assert re.search(r"^b +unusable", said, re.MULTILINE)
    assert re.search(r"^a +yes .* good", said, re.MULTILINE)
    assert re.search(r"^keys/issued/b\.pem: .*; copy it from its node", said, re.MULTILINE)
    assert Keyring(Path("keys")).issued() == ["a", "b"]
    assert say("deca-node swarm renew --run r --trust keys")[0] == 0


def test_nobody_elses_key_is_made_here(say):
    """The certificate of another machine's node would be renewed on paper only."""
    assert say("deca-node swarm init --run r --node a --trust keys")[0] == 0
    assert say("deca-node swarm issue b --to elsewhere --run r --trust keys")[0] == 0
    issued = Keyring(Path("keys")).issued_certificate("b")
    assert say("deca-node swarm renew --trust keys --node b")[0] == 12
    assert Keyring(Path("keys")).nodes() == ["a"]
    assert Keyring(Path("keys")).issued_certificate("b") == issued
    assert say("deca-node swarm renew --trust keys --node a")[0] == 0


def test_a_node_that_is_called_operator_can_be_put_out(say):
    assert say("deca-node swarm init --run r --node operator")[0] == 0
    assert say("deca-node swarm revoke operator --run r")[0] == 0


def test_all_are_told_whoever_does_not_answer(say, monkeypatch):
    """In the order given; the line at the end names each that is to be told again."""
    asked = []

    class Link:
        def __init__(self, address, credentials):
            self.address = address

        async def exchange_revocations(self, marks, timeout):
            asked.append(self.address)
            if self.address != "10.0.0.2:1":
                raise PeerUnavailable(f"{self.address}: Connection refused")

        async def close(self):
            pass

    monkeypatch.setattr(cli_swarm, "GrpcLink", Link)
    assert say("deca-node swarm init --run r --node a")[0] == 0
    addresses = [f"10.0.0.{number}:1" for number in (1, 2, 3)]
    tell = " ".join(f"--tell {address}" for address in addresses)
    code, said = say(f"deca-node swarm revoke b --run r {tell}")
    assert (code, asked) == (3, addresses)
    assert "told 10.0.0.2:1" in said
    assert "not told to 10.0.0.1:1: Connection refused; 10.0.0.3:1: Connection refused" in said


@pytest.mark.parametrize("crash", range(1, 9))
def test_a_run_whose_making_was_cut_off_can_be_made(say, monkeypatch, crash):
    """A full disk at each file in turn: afterwards `init` can be typed again, or is done."""
    write, written = keyring._write, []

    def full(path, content):
        written.append(path.name)
        if len(written) == crash:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(keyring, "_write", full)
        code, said = say("deca-node swarm init --run r --node a --trust keys")
    assert code == (9 if len(written) == crash else 0), said
    if code:
        code, said = say("deca-node swarm init --run r --node a --trust keys")
    else:
        assert written[-1] == "authority.pem"
    assert code == 0, said
    made = Keyring(Path("keys"))
    assert made.open_authority().certificate == made.authority
    assert made.operator()
    assert made.node("a")


def test_a_key_whose_authority_is_lost_is_not_overwritten(say):
    """Every member has authority.pem, so that the run can go on with both."""
    assert say("deca-node swarm init --run r --node a --trust keys")[0] == 0
    key = Path("keys/authority.key").read_bytes()
    Path("keys/authority.pem").unlink()
    assert say("deca-node swarm init --run r --node a --trust keys")[0] == 0
    assert Path("keys/authority.key.old").read_bytes() == key
    assert Path("keys/authority.key").read_bytes() != key


def test_names_come_from_a_nodes_settings(say, tmp_path):
    """Run, node and folder, as `start` would use them."""
    (tmp_path / "node.toml").write_text(
        'run.name = "bbc"\nnode.name = "dora"\ntrust.folder = "keys"\n'
        'model.path = "m"\ndata.train = "d.jsonl"\n'
    )
    code, said = say("deca-node swarm init -c node.toml")
    assert code == 0, said
    assert Keyring(tmp_path / "keys").run == "bbc"
    assert Keyring(tmp_path / "keys").nodes() == ["dora"]
    assert said.rstrip().endswith("deca-node swarm invite --config node.toml")
    assert say("deca-node swarm show --config node.toml")[0] == 0
    code, said = say("deca-node swarm init -c node.toml --run other")
    assert said.rstrip().endswith("deca-node swarm invite --config node.toml --run other")
    code, said = say("deca-node swarm init --trust 'my keys' --run r --node a")
    assert said.rstrip().endswith("deca-node swarm invite --run r --trust 'my keys'")
    assert say("deca-node swarm show --trust 'my keys'")[0] == 0


def test_an_inviter_that_cannot_list_its_interfaces_says_so(say, monkeypatch):
    """As under a seccomp that forbids netlink. Where the joiner calls can be told instead."""

    def refused():
        raise PermissionError(errno.EPERM, "Operation not permitted")

    async def joined(_):
        return "b"

    monkeypatch.setattr(discovery.ifaddr, "get_adapters", refused)
    monkeypatch.setattr(pairing.Inviter, "joined", joined)
    assert say("deca-node swarm init --run r --node a")[0] == 0
    code, said = say("deca-node swarm invite --run r")
    assert code == 6
    assert "cannot be listed: Operation not permitted; give --advertise HOST:PORT" in said
    code, said = say("deca-node swarm invite --run r --advertise 192.0.2.7:7000")
    assert code == 0, said
    assert "at 192.0.2.7:7000;" in said


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("swarm init --run r", 12, "already has an authority"),
        ("swarm init --run R", 2, "48 characters"),
        ("swarm show --run other", 12, "swarm init"),
        ("swarm issue b --to c --run r", 12, "revoked for good"),
        ("swarm invite --node b --run r", 12, "revoked for good"),
        ("swarm invite", 12, "deca: no such folder; name the run with --config FILE or --run NAME"),
        ("swarm invite --ttl soon --run r", 2, "90s, 10m or 2h"),
        ("swarm invite --ttl 3d --run r", 2, "90s, 10m or 2h"),
        ("swarm invite --advertise host --run r", 2, "HOST:PORT"),
        ("swarm join nonsense", 12, "no invitation"),
        ("swarm revoke c --run r --tell host", 2, "HOST:PORT"),
        ("swarm revoke b --run r --tell 127.0.0.1:9", 3, "revoked, but not told"),
        ("swarm revoke operator --run r", 12, "cannot be revoked"),
        ("swarm renew --run r --node typo", 12, "has a; for one on another machine: deca-node"),
        ("swarm renew --run r --node typo", 12, "invite --node typo --run r"),
        ("status 127.0.0.1:9 --trust nowhere", 12, "no such file"),
        ("swarm status 127.0.0.1:9 --trust nowhere", 12, "no such file"),
        ("status 127.0.0.1:9 --trust config/deca-node/r", 3, "no deca-node answers"),
    ],
)
def test_what_is_wrong_is_one_line(say, line, code, words):
    """With its exit code and the remedy."""
    assert say("deca-node swarm init --run r --node a")[0] == 0
    assert say("deca-node swarm revoke b --run r")[0] == 0
    found, said = say(f"deca-node {line}")
    assert found == code, said
    assert words in " ".join(said.split())
    assert "Traceback" not in said
