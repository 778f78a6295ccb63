"""The dashboard in a real Chromium, watching real daemons that train."""

import asyncio
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from contextlib import contextmanager

import pytest

from deca_node.dashboard import web
from deca_node.observer import Observer
from deca_node.panorama import Panorama
from tests.cluster.daemons import Daemon, end_all
from tests.pretend import PretendSwarm
from tests.tiny import make_model

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
PATIENCE = 240_000  # ms; a bound on failure

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)"),
]


class Page:
    """A page and what it did that it should not."""

    def __init__(self, page, origin):
        self.page, self.origin, self.wrong = page, origin, []
        page.on("pageerror", lambda error: self.wrong.append(f"error {error}"))
        page.on("console", self._said)
        page.on("request", self._asked)

    def _said(self, message):
        if message.type in ("error", "warning"):
            self.wrong.append(f"console {message.type}: {message.text}")

    def _asked(self, request):
        if not request.url.startswith(self.origin):
            self.wrong.append(f"asked {request.url}")

    def until(self, condition):
        """Ask in JavaScript until it is so: the page's own policy forbids Playwright's waiting."""
        limit = time.monotonic() + PATIENCE / 1000
        while not self.page.evaluate(condition):
            assert time.monotonic() < limit, f"{condition} never was; {self.wrong}"
            self.page.wait_for_timeout(100)

    def text(self, selector):
        return self.page.locator(selector).inner_text()

    def all(self, selector):
        return self.page.locator(selector).all_inner_texts()


@contextmanager
def browsing(folder, address, *, width=1440, height=1000, scheme="light"):
    """A fresh Chromium at the dashboard."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            folder / f"profile-{uuid.uuid4().hex[:6]}",
            executable_path=CHROMIUM,
            headless=True,
            args=FLAGS,
            viewport={"width": width, "height": height},
            color_scheme=scheme,
            reduced_motion="reduce",
        )
        try:
            page = Page(context.pages[0], address.partition("#")[0].rstrip("/"))
            page.page.set_default_timeout(PATIENCE)
            page.page.goto(address)
            yield page
        finally:
            context.close()


@contextmanager
def dashboard(*arguments):
    """`deca-node dashboard` as a process; yields its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "deca_node", "dashboard", *arguments, "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        yield line.split()[2], process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@contextmanager
def pretending(swarm):
    """A made-up swarm behind a real dashboard; yields its address."""
    ready, ended = threading.Event(), []

    async def serve():
        panorama = Panorama()
        feed = web.Feed(panorama, 0.5, swarm.addresses[:1])
        observer = Observer(panorama, swarm.link, lambda: swarm.addresses[:1], 0.5)
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        ended.append(lambda: loop.call_soon_threadsafe(stop.set))
        with web.listen("127.0.0.1", 0) as opened:
            ended.append(opened.getsockname()[1])
            ready.set()
            await web.serve(web.make_app(feed), feed, observer, opened, stop)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert ready.wait(60)
    try:
        yield f"http://127.0.0.1:{ended[1]}"
    finally:
        ended[0]()
        thread.join(60)


@pytest.fixture
def daemons(tmp_path):
    """Three daemons that train a tiny model for longer than any test."""
    model = make_model(tmp_path / "tiny", "llama")
    rows = [{"text": f"{'abcd'[i % 4]} {i}", "label": "ab"[i % 2]} for i in range(24)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [
        f"run.name=seen-{uuid.uuid4().hex[:8]}",
        f"model.path={model}",
        "model.dtype=fp32",
        f"data.train={data}",
        "data.share_label_counts=true",
        "run.start_when=3",
        "schedule.rounds=1000",
        "schedule.steps=20",
    ]
    made = [Daemon(tmp_path, name, settings) for name in ("ada", "bob", "cyd")]
    for daemon in made:
        daemon.deadline = 300.0  # three load a model beside a browser
    yield made
    end_all(made)


def test_a_swarm_that_trains_is_shown_live_and_a_killed_node_as_gone(daemons, tmp_path):
    """From one address: nodes, edges, curves, schedule, skew, events, details; then one dies."""
    for daemon in daemons:
        daemon.start()
    address = daemons[0].until(lambda status: status.steps_done >= 5).address
    with dashboard(address, "--operate") as (home, _), browsing(tmp_path, home) as seen:
        seen.until("document.querySelectorAll('#node-rows tr.live').length === 3")
        # On a busy machine steps of a millisecond may wait for an edge most of the time.
        seen.until("document.querySelectorAll('.edge.ok, .edge.slow').length === 3")
        seen.until("/ada .*bob .*cyd /.test(document.querySelector('#loss-card canvas').ariaLabel)")
        seen.until("document.querySelectorAll('.cell.here').length > 0")
        names = seen.page.locator(".node .name").all_text_contents()
        assert names == ["ada", "bob", "cyd"]
        assert seen.text("#run-name") == daemons[0].run_name
        assert "training" in seen.text("#phases")
        assert seen.all("#skew-rows tr:first-child td") == ["12", "12", "24"]
        assert any("joined" in line for line in seen.all("#event-list li"))
        before = int(seen.page.get_attribute("#progress", "aria-valuenow"))
        assert 0 <= before < 100

        # A point that is newer than what was there when the page came: the curve grows.
        grown = """async () => (await (await fetch('/api/state')).json())
            .curves[document.querySelector('#node-rows tr').dataset.key].at(-1)[1]"""
        first = seen.page.evaluate(grown)
        seen.until(f"async () => (await ({grown})()) > {first + 5}")

        # By keyboard: a node's details, and back.
        seen.page.locator(".node[tabindex='0']").focus()
        seen.page.keyboard.press("ArrowRight")
        seen.page.keyboard.press("Enter")
        seen.page.wait_for_selector("#details .facts")
        assert seen.text("#details-title") in ("ada", "bob", "cyd")
        seen.until(
            "document.querySelectorAll('#details tbody tr, #details table > tr').length === 2"
        )
        seen.page.keyboard.press("Escape")
        assert seen.page.locator("#details").is_hidden()
        # The read-out under the pointer.
        seen.page.hover("#loss-card canvas")
        seen.until("!document.getElementById('tip').hidden")
        assert all(name in seen.text("#tip") for name in ("step", "ada", "bob", "cyd"))

        operate(seen, daemons[0])

        daemons[2].end(signal.SIGKILL)
        seen.until("document.querySelectorAll('#node-rows tr.gone').length === 1")
        assert "cyd" in seen.text("#node-rows tr.gone")
        assert "cyd" in seen.text("#warning-list li.bad")
        seen.until("document.querySelectorAll('.edge.gone').length === 2")
        seen.page.click("#events-trouble")
        told = "/cyd.*does not answer/.test(document.getElementById('event-list').innerText)"
        seen.until(told)
        seen.page.screenshot(path=tmp_path / "gone.png", full_page=True)
        assert seen.wrong == []


def operate(seen, daemon):
    """The operator pauses a node, lets it go on, and thinks better of stopping it."""
    assert "operate=" not in seen.page.url
    seen.page.click(f"#node-rows tr:has-text('{daemon.name}') .pick")
    said = "document.querySelector('#operate [role=status]').innerText.includes({!r})"
    phase = "document.querySelector('#details .badge').innerText.includes({!r})"
    seen.page.click("#operate [data-verb=pause]")
    seen.until(said.format("pauses after the step under way"))
    seen.until(phase.format("paused"))
    seen.page.click("#operate [data-verb=resume]")
    seen.until(said.format("takes part again"))
    seen.until(phase.format("training"))
    seen.page.click("#operate [data-verb=stop]")
    assert seen.all("#operate button:visible") == [f"Stop {daemon.name}, its state saved", "Cancel"]
    seen.page.screenshot(path=daemon.folder / "operate.png")
    seen.page.get_by_role("button", name="Cancel").click()
    assert seen.page.locator("#operate [data-verb=stop]").is_visible()
    seen.page.keyboard.press("Escape")


def test_a_dashboard_that_ends_leaves_a_page_that_says_so(tmp_path):
    with dashboard("127.0.0.1:9") as (origin, process), browsing(tmp_path, origin) as seen:
        seen.until("document.querySelector('#empty').innerText.includes('127.0.0.1:9')")
        assert "No node answers at 127.0.0.1:9" in seen.text("#empty")
        assert "deca-node start" in seen.text("#empty")
        assert seen.wrong == []
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        seen.until("document.querySelector('#live-text').innerText.startsWith('no news')")


@pytest.mark.parametrize(("count", "kind"), [(4, "ring"), (30, "erdos_renyi"), (120, "ring")])
def test_it_fits_narrow_and_wide_light_and_dark(count, kind, tmp_path):
    """No sideways scrolling, nothing wrong, and names of nodes inside of the picture."""
    swarm = PretendSwarm(count, kind=kind, blocks=30 if count > 4 else 10, share=count < 100)
    swarm.now = 60.0
    with pretending(swarm) as origin:
        for width, height, scheme in ((390, 844, "dark"), (1440, 1000, "light")):
            with browsing(tmp_path, origin, width=width, height=height, scheme=scheme) as seen:
                seen.until(f"document.querySelectorAll('.node.live').length === {count}")
                seen.until("/median|node-0 /.test(document.querySelector('canvas').ariaLabel)")
                wide = seen.page.evaluate("document.documentElement.scrollWidth")
                assert wide <= width
                outside = seen.page.evaluate(
                    """() => {
                        const box = document.querySelector('.graph').getBoundingClientRect();
                        return [...document.querySelectorAll('.node')].filter((node) => {
                            const own = node.getBoundingClientRect();
                            return own.left < box.left || own.right > box.right;
                        }).length;
                    }"""
                )
                assert outside == 0
                assert seen.wrong == []


def test_what_a_hostile_node_tells_is_only_text(tmp_path):
    """Markup in every text stays text, and runs nothing."""
    swarm = PretendSwarm(3)
    swarm.now = 60.0
    evil = "<img src=x onerror=\"console.error('pwned')\"><script>alert(1)</script>"
    swarm.warnings = {"node-1": [evil]}
    plain = swarm.status

    def status(name):
        told = plain(name)
        if name == "node-1":
            told.model = told.device = told.waiting_for = told.version = evil
            told.label_counts[evil] = 3
            told.refusals[evil] = 2
            for peer in told.peers:
                peer.detail = evil
            told.peers.add(node=evil, address=evil, state=evil, neighbour=True)
            told.events.add(serial=99, kind=evil, text=evil, peer=evil)
        return told

    swarm.status = status
    with pretending(swarm) as origin, browsing(tmp_path, origin) as seen:
        seen.until("document.querySelectorAll('.node.live').length === 3")
        seen.until("document.querySelector('#warning-list').innerText.includes('<img')")
        seen.page.click("#node-rows tr:has-text('node-1') .pick")
        seen.until("document.querySelector('#details-body').innerText.includes('<script>')")
        made = "document.querySelectorAll('main img, main script, aside img, aside script').length"
        assert seen.page.evaluate(made) == 0
        assert seen.wrong == []
