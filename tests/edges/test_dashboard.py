"""The dashboard's server: what it answers, whom it turns away, how it follows nodes."""

import asyncio
import json
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from starlette.testclient import TestClient

from deca_node import cli, errors
from deca_node.dashboard import web
from deca_node.errors import ControlError, ListenError, PeerRefused, PeerUnavailable
from deca_node.limits import MAX_BROWSERS, REFUSAL_LINES, REFUSAL_LINES_BURST
from deca_node.observer import Observer
from deca_node.panorama import Panorama
from deca_node.transport.client import ask_status
from deca_node.transport.server import GrpcTransport
from tests.edges.test_registry import _own_folder  # noqa: F401 - nodes of this machine stay out
from tests.edges.test_transport import serving
from tests.pretend import PretendSwarm

HOME = "http://127.0.0.1:7480"
PAGE = Path(web.__file__).parent / "page"
NODE = shutil.which("node")


def _watched(swarm):
    panorama = Panorama()
    panorama.give(swarm.addresses)
    for name in swarm.names:
        panorama.answered(swarm.address(name), swarm.status(name), 0.0)
        points = [swarm.point(name, step) for step in range(swarm.done(name))]
        panorama.steps_made(swarm.address(name), points)
    return panorama


@pytest.fixture
def feed():
    swarm = PretendSwarm(4)
    swarm.now = 50.0
    return web.Feed(_watched(swarm), 1.0, swarm.addresses[:1])


@pytest.fixture
def client(feed):
    return TestClient(web.make_app(feed), base_url=HOME)


def test_the_page_and_all_that_it_loads_come_from_here(client):
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "<title>deca-node</title>" in page.text
    for name in ("style.css", "app.js", "graph.js", "chart.js", "icon.svg"):
        found = client.get(f"/page/{name}")
        assert found.status_code == 200
        assert found.headers["x-content-type-options"] == "nosniff"
        for word in ("http://", "https://", "innerHTML", "eval(", "@import"):
            allowed = found.text.count("http://www.w3.org/2000/svg") if word == "http://" else 0
            assert found.text.count(word) == allowed, (name, word)


def test_every_answer_forbids_what_the_page_does_not_need(client):
    for path in ("/", "/page/app.js", "/api/state", "/nowhere", "/healthz"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert headers["cache-control"] == "no-store"


def test_files_outside_of_the_page_cannot_be_had(client):
    for path in ("/page/../web.py", "/page/%2e%2e%2fweb.py", "/page/__init__.py", "/page/"):
        assert client.get(path).status_code == 404


def test_nothing_can_be_changed(client):
    for path in ("/", "/api/state", "/api/node", "/api/stream"):
        assert client.post(path).status_code == 405
        assert client.put(path).status_code == 405


@pytest.fixture
def told():
    """What nodes were told, and what they say to it by verb."""
    return []


@pytest.fixture
def log():
    """Lines about requests that were turned away."""
    return []


@pytest.fixture
def operated(feed, told, log):
    """A client, and the headers with which the page operates nodes."""

    async def tell(key, verb):
        told.append((key, verb))
        if verb == "stop":
            raise ControlError("stop refused by 10.0.0.1:1: only the operator")
        return "pauses after the step under way"

    operator = web.Operator(tell, frozenset({"pause", "stop"}))
    app = web.make_app(feed, operator=operator, refused=log.append)
    return TestClient(app, base_url=HOME), {
        "origin": HOME,
        "content-type": "application/json",
        "x-deca-operator": operator.token,
        "sec-fetch-site": "same-origin",
    }


PAUSE = json.dumps({"key": "bbc/node-0", "verb": "pause"})


def test_the_operator_tells_a_node_and_hears_what_it_says(operated, told):
    client, headers = operated
    answer = client.post("/api/operate", content=PAUSE, headers=headers)
    assert (answer.status_code, answer.json()) == (200, {"said": "pauses after the step under way"})
    stop = json.dumps({"key": "bbc/node-0", "verb": "stop"})
    answer = client.post("/api/operate", content=stop, headers=headers)
    assert answer.status_code == 409
    assert "only the operator" in answer.json()["error"]
    assert told == [("bbc/node-0", "pause"), ("bbc/node-0", "stop")]


@pytest.mark.parametrize(
    "changed",
    [
        {"x-deca-operator": ""},
        {"x-deca-operator": "guess"},
        {"x-deca-operator": "gu\u00e9ss".encode()},
        {"origin": "http://evil.example"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "null"},
        {"origin": None},
        {"content-type": "text/plain"},  # what a form of another site can send
        {"content-type": "application/x-www-form-urlencoded"},
        {"sec-fetch-site": "cross-site"},
        {"host": "evil.example"},
        {"host": "192.168.1.5:7480", "origin": "http://192.168.1.5:7480"},
    ],
    ids=str,
)
def test_nobody_else_operates_nodes(operated, told, log, changed):
    client, headers = operated
    headers = {name: value for name, value in {**headers, **changed}.items() if value is not None}
    answer = client.post("/api/operate", content=PAUSE, headers=headers)
    assert answer.status_code == 403
    assert not told
    (line,) = log  # with the reason that the caller was given
    assert line.startswith("refused POST /api/operate from testclient")
    assert line.endswith(answer.text.strip() if answer.text[0] != "{" else answer.json()["error"])
    if origin := headers.get("origin"):
        assert f"(page of {origin})" in line


def test_a_line_about_a_refusal_is_one_line_and_shows_no_token(operated, log):
    client, headers = operated
    wrong = {**headers, "origin": "http://evil\x1b[2J" + "x" * 9000, "x-deca-operator": "guess"}
    client.post("/api/operate", content=PAUSE, headers=wrong)
    client.get("/api/st%C3%A4te%0d%0asecond" + "y" * 9000, headers={"host": "evil.example"})
    assert len(log) == 2
    for line in log:
        assert line.isprintable()
        assert line.isascii()  # whatever the terminal's letters are
        assert len(line) < 300
        assert "guess" not in line
    assert "(called evil.example)" in log[1]


def test_who_is_refused_learns_nothing_of_the_terminal(feed):
    """It may be a pipe that nobody reads any more."""

    def gone(_):
        raise BrokenPipeError

    client = TestClient(web.make_app(feed, refused=gone), base_url="http://evil.example")
    assert client.get("/api/state").status_code == 403


def test_a_flood_of_refusals_is_a_few_lines(operated, log, monkeypatch):
    """As many as a node's log has of refused callers; the next line says how many it left out."""
    now = [0.0]
    monkeypatch.setattr(web, "time", SimpleNamespace(monotonic=lambda: now[0]))
    client, headers = operated
    for _ in range(REFUSAL_LINES_BURST + 7):
        wrong = {**headers, "x-deca-operator": "guess"}
        assert client.post("/api/operate", content=PAUSE, headers=wrong).status_code == 403
    assert len(log) == REFUSAL_LINES_BURST
    now[0] = 1 / REFUSAL_LINES
    for _ in range(2):
        client.get("/api/state", headers={"sec-fetch-site": "cross-site"})
    assert len(log) == REFUSAL_LINES_BURST + 1
    assert log[-1].endswith("; 7 more since the last such line")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("", 400),
        ("[]", 400),
        ("{", 400),
        ('{"key": "bbc/node-0"}', 400),
        ('{"key": "bbc/node-0", "verb": "export"}', 400),
        ('{"key": "' + "x" * 5000 + '", "verb": "pause"}', 413),
        ("[" * 900, 400),
    ],
    ids=range(7),
)
def test_a_wrong_order_is_none(operated, told, body, status):
    client, headers = operated
    assert client.post("/api/operate", content=body, headers=headers).status_code == status
    assert not told


def test_the_token_is_in_no_answer(operated):
    """A user of this machine who can reach the port can look, and no more."""
    client, headers = operated
    token = headers["x-deca-operator"]
    assert len(token) >= 43
    for path in ("/", "/page/app.js", "/page/operate.js", "/api/state", "/healthz", "/api/operate"):
        answer = client.get(path)
        assert token not in answer.text + str(answer.headers)
    assert client.get("/api/operate").status_code == 405


def test_without_the_option_there_is_nothing_to_operate(client):
    assert client.post("/api/operate", content=PAUSE).status_code == 404


def test_the_state_is_json(client):
    tree = client.get("/api/state").json()
    assert [node["node"] for node in tree["runs"][0]["nodes"]] == [f"node-{n}" for n in range(4)]
    assert tree["given"] == ["127.0.0.1:17430"]
    assert set(tree["curves"]) == {f"bbc/node-{n}" for n in range(4)}
    assert tree["events"]


def test_one_node_in_full(client):
    tree = client.get("/api/node", params={"key": "bbc/node-2"}).json()
    assert tree["node"] == "node-2"
    assert len(tree["peers"]) == 3
    assert client.get("/api/node", params={"key": "bbc/<nobody>"}).status_code == 404
    assert client.get("/api/node").status_code == 404


@pytest.mark.parametrize(
    ("host", "public", "expected"),
    [
        ("127.0.0.1:7480", False, True),
        ("localhost:7480", False, True),
        ("localhost", False, True),
        ("[::1]:7480", False, True),
        ("[::1]", False, True),
        ("127.9.9.9", False, True),
        ("evil.example:7480", False, False),
        ("localhost.evil.example", False, False),
        ("127.0.0.1.evil.example", False, False),
        ("192.168.1.5:7480", False, False),
        ("192.168.1.5:7480", True, True),
        ("[fe80::1]:7480", True, True),
        ("evil.example", True, False),
        ("gpu-1.lan:7480", True, True),  # allowed by name
        ("GPU-1.LAN.", False, True),
        ("", True, False),
    ],
)
def test_only_expected_names_are_answered(feed, host, public, expected):
    """A hostile page whose name is made to lead here (DNS rebinding) reads nothing."""
    app = web.make_app(feed, names=frozenset({"gpu-1.lan"}), public=public)
    answer = TestClient(app, base_url=HOME).get("/api/state", headers={"host": host})
    assert answer.status_code == (200 if expected else 403)
    assert expected or "--allow-host" in answer.text


def test_pages_of_other_sites_are_not_answered(client):
    for site, status in (("same-origin", 200), ("none", 200), ("cross-site", 403)):
        headers = {"sec-fetch-site": site}
        assert client.get("/api/state", headers=headers).status_code == status
    # A link to the page itself may stand anywhere.
    assert client.get("/", headers={"sec-fetch-site": "cross-site"}).status_code == 200


def test_there_is_room_for_so_many_browsers(feed, client):
    feed.viewers = MAX_BROWSERS
    answer = client.get("/api/stream")
    assert answer.status_code == 503
    assert str(MAX_BROWSERS) in answer.text


async def test_the_stream_tells_everything_once_and_then_what_is_new():
    swarm = PretendSwarm(2)
    swarm.now = 50.0
    panorama = _watched(swarm)
    feed = web.Feed(panorama, 1.0, swarm.addresses)
    stream = feed.stream()
    first = await anext(stream)
    assert first["whole"]
    assert first["events"]
    done = swarm.done("node-0")
    assert len(first["curves"]["bbc/node-0"]) == done
    waiting = asyncio.create_task(anext(stream))
    await asyncio.sleep(0)
    swarm.now = 52.0
    panorama.answered(swarm.addresses[0], swarm.status("node-0"), 2.0)
    points = [swarm.point("node-0", step) for step in range(done, done + 2)]
    panorama.steps_made(swarm.addresses[0], points)
    feed.tick()
    second = await waiting
    assert not second["whole"]
    assert second["events"] == []
    assert [point[0] for point in second["curves"]["bbc/node-0"]] == [done, done + 1]
    assert json.loads(json.dumps(second, allow_nan=False)) == second
    feed.close()
    assert [tree async for tree in stream] == []


# --- the page's modules, without a browser

# As much of a document as panels.js asks for, with `drawn(id)` for the texts of an element's rows.
_DOCUMENT = """
class Element {
  constructor() {
    Object.assign(this, { children: [], dataset: {}, attributes: {}, style: { setProperty() {} } });
    this.own = "";
  }
  get firstElementChild() { return this.children[0] ?? null; }
  get lastElementChild() { return this.children.at(-1) ?? null; }
  get nextElementSibling() {
    return this.parent.children[this.parent.children.indexOf(this) + 1] ?? null;
  }
  get textContent() {
    return this.own + this.children.map((child) => child.textContent).join(" ");
  }
  set textContent(text) { this.own = text; }
  getAttribute(name) { return this.attributes[name] ?? null; }
  setAttribute(name, value) { this.attributes[name] = String(value); }
  append(...children) { for (const child of children) this.insertBefore(child, null); }
  insertBefore(child, place) {
    child.remove();
    const at = place ? this.children.indexOf(place) : this.children.length;
    this.children.splice(at, 0, child);
    child.parent = this;
  }
  remove() {
    this.parent?.children.splice(this.parent.children.indexOf(this), 1);
    this.parent = null;
  }
}
const elements = new Map();
globalThis.document = {
  createElement: () => new Element(),
  getElementById(id) {
    if (!elements.has(id)) elements.set(id, new Element());
    return elements.get(id);
  },
};
const drawn = (id) => document.getElementById(id).children.map((child) => child.textContent);
"""


def _in_page(folder, script):
    """What a script prints that imports the page's modules, as JSON."""
    shutil.copytree(PAGE, folder / "page")
    (folder / "package.json").write_text('{"type": "module"}')
    (folder / "test.js").write_text(_DOCUMENT + script)
    ran = subprocess.run(
        [NODE, folder / "test.js"], capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


needs_node = pytest.mark.skipif(NODE is None, reason="needs the command node (Node.js)")


@needs_node
def test_items_of_one_key_have_a_row_each_however_often_they_are_drawn(tmp_path):
    script = """
        const { sync } = await import("./page/dom.js");
        const list = new Element(), made = [];
        for (const items of ["aab", "aab", "baa", "a", "aaa"]) {
          const update = (row, item) => { row.own = item; };
          sync(list, [...items], (item) => item, () => new Element(), update);
          made.push(list.children.map((row) => row.textContent).join(""));
        }
        const kept = list.children[0];
        sync(list, ["a"], (item) => item, () => new Element(), () => {});
        console.log(JSON.stringify([...made, list.children[0] === kept]));
    """
    assert _in_page(tmp_path, script) == ["aab", "aab", "baa", "a", "aaa", True]


@needs_node
def test_warnings_that_differ_only_in_numbers_are_a_row_each(tmp_path):
    """And one whose seconds are counted stays the same row."""
    script = """
        const { warnings } = await import("./page/panels.js");
        const texts = ["10.0.0.1:7430 is silent", "10.0.0.2:7430 is silent"];
        const found = texts.map((text) => ({ text, nodes: ["ada"] }));
        const rows = () => document.getElementById("warning-list").children;
        let kept = null, same = true;
        for (let age = 11; age < 16; age += 1) {
          const nodes = [{ key: "r/bob", node: "bob", state: "gone", age }];
          warnings({ summary: { warnings: found }, nodes });
          same &&= kept === null || kept === rows()[0];
          kept = rows()[0];
        }
        console.log(JSON.stringify([same, ...drawn("warning-list")]));
    """
    same, gone, *found = _in_page(tmp_path, script)
    assert same
    assert "has not answered for 15s" in gone
    assert found == [f"! ada 10.0.0.{n}:7430 is silent" for n in (1, 2)]


@needs_node
def test_a_label_of_any_name_is_a_column_of_its_own(tmp_path):
    script = """
        const { skew } = await import("./page/panels.js");
        const nodes = [
          { key: "r/ada", node: "ada", label_counts: { all: 3, "": 4, constructor: 5 } },
          { key: "r/bob", node: "bob", label_counts: { node: 7 } },
        ];
        for (let tick = 0; tick < 3; tick += 1) skew(nodes);
        const rows = document.getElementById("skew-rows").children;
        const cells = [...rows].map((row) => row.children.map((cell) => cell.textContent));
        console.log(JSON.stringify([drawn("skew-head"), ...cells]));
    """
    assert _in_page(tmp_path, script) == [
        ["", "", "all", "constructor", "node", "all"],
        ["ada", "4", "3", "5", "0", "12"],
        ["bob", "0", "0", "0", "7", "7"],
    ]


@needs_node
@pytest.mark.parametrize("operates", [False, True])
def test_the_footer_says_whether_the_page_changes_anything(operates, tmp_path):
    script = """
        const { header } = await import("./page/panels.js");
        document.getElementById("progress").append(new Element());
        header({ runs: [], given: [], version: "1", interval: 1 }, null, OPERATES);
        console.log(JSON.stringify(document.getElementById("footer").textContent));
    """
    told = _in_page(tmp_path, script.replace("OPERATES", json.dumps(operates)))
    assert ("this page changes nothing" in told) is not operates
    assert ("tells nodes what to do" in told) is operates


# --- following nodes


class _Links:
    """Nodes as links, each of which can be made to fail."""

    def __init__(self, swarm):
        self.swarm, self.made, self.closed = swarm, 0, 0
        self.old = False

    async def __call__(self, address):
        self.made += 1
        inner = await self.swarm.link(address)
        links = self

        class Link:
            async def get_status(self, timeout):
                return await inner.get_status(timeout)

            async def get_history(self, after, limit, timeout):
                if links.old:
                    raise PeerRefused("unimplemented", "an older node")
                return await inner.get_history(after, limit, timeout)

            async def close(self):
                links.closed += 1

        return Link()


async def _until(observer, met):
    """Observe until a condition holds at a tick."""
    done = asyncio.Event()
    task = asyncio.create_task(observer.run(lambda: done.set() if met() else None))
    try:
        await asyncio.wait_for(done.wait(), 30)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_nodes_are_followed_from_one_address():
    swarm = PretendSwarm(3)
    swarm.now = 40.0
    panorama, links = Panorama(), _Links(swarm)
    observer = Observer(panorama, links, lambda: swarm.addresses[:1], 0.01)
    await _until(observer, lambda: len(panorama.curves({})) == 3)
    assert links.made == links.closed == 3
    curve = panorama.curves({})["bbc/node-1"]
    assert [point[0] for point in curve] == list(range(swarm.done("node-1")))


async def test_a_node_that_falls_silent_is_asked_anew():
    swarm = PretendSwarm(2)
    swarm.now = 40.0
    panorama, links = Panorama(), _Links(swarm)
    observer = Observer(panorama, links, lambda: swarm.addresses, 0.01)

    def states():
        runs = panorama.view(0)["runs"]
        return [node["state"] for node in runs[0]["nodes"]] if runs else []

    await _until(observer, lambda: states() == ["live", "live"])
    swarm.down["node-1"] = 40.0
    observer = Observer(panorama, links, lambda: swarm.addresses, 0.01)
    await _until(observer, lambda: states() == ["live", "stale"])
    swarm.down.clear()
    observer = Observer(panorama, links, lambda: swarm.addresses, 0.01)
    await _until(observer, lambda: states() == ["live", "live"])


async def test_an_older_node_gives_a_point_at_least():
    swarm = PretendSwarm(1)
    swarm.now = 40.0
    panorama, links = Panorama(), _Links(swarm)
    links.old = True
    observer = Observer(panorama, links, lambda: swarm.addresses, 0.01)
    await _until(observer, lambda: panorama.curves({}))
    assert [point[0] for point in panorama.curves({})["bbc/node-0"]] == [39]


# --- the command


def _run(*arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return ended.value.code


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["127.0.0.1"], "'127.0.0.1' is not HOST:PORT"),
        (["127.0.0.1:7430", "nonsense:port"], "'nonsense:port' is not HOST:PORT"),
        (["--host", "0.0.0.0"], "--host 0.0.0.0 shows the swarm to every machine"),
        (["--host", "0.0.0.0", "--public", "--operate"], "--operate serves on the loopback only"),
        (["--host", "192.0.2.1", "--operate"], "--operate serves on the loopback only"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, words, capsys):
    assert _run("dashboard", *arguments) == errors.ConfigError.exit_code
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1


def test_a_taken_port_is_one_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert _run("dashboard", "--port", str(port)) == ListenError.exit_code
    told = capsys.readouterr().err
    assert f"127.0.0.1:{port}" in told
    assert "--port" in told


async def test_the_command_serves_until_it_is_told_to_end():
    """With no node to watch it starts, and its page says so; an open browser does not hold it.

    A gRPC client that asks it is told what it has met.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "deca_node", "dashboard", "127.0.0.1:9", "--port", "0"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        line = (await asyncio.wait_for(process.stdout.readline(), 120)).decode()
        assert line.startswith("dashboard at http://127.0.0.1:")
        port = int(line.split("/")[2].rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /api/stream HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        data = await asyncio.wait_for(reader.readuntil(b"\ndata: "), 60)
        assert b"200 OK" in data
        tree = json.loads(
            (await asyncio.wait_for(reader.readuntil(b"\n\n"), 60)).partition(b"\r")[0]
        )
        assert tree["runs"] == []
        assert [one["address"] for one in tree["silent"]] == ["127.0.0.1:9"]
        with pytest.raises(PeerUnavailable, match="a web server is there"):
            await ask_status(f"127.0.0.1:{port}", 30)
        process.send_signal(signal.SIGTERM)
        _, err = await asyncio.wait_for(process.communicate(), 60)
        writer.close()
        assert process.returncode == 0
        assert b"Traceback" not in err
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_a_node_is_told_apart_from_a_page():
    """A browser that asks the gRPC port is let go at once, and the node goes on answering."""
    async with serving(lambda port=0: GrpcTransport("127.0.0.1", port)) as (_, _, _, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        await asyncio.wait_for(reader.read(), 30)  # to the end of the connection
        writer.close()
        assert (await ask_status(f"127.0.0.1:{port}", 30)).node == "bob"
