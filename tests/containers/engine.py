"""A container engine for tests: the one that runs here, or one of our own that ends with them.

What is expensive to make again stays in a cache folder: the engine's images and layers, and a
stand-in for the base image where no registry of images can be reached.
"""

import contextlib
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import filelock

REPOSITORY = Path(__file__).resolve().parents[2]
COMPOSE_FILE = REPOSITORY / "compose" / "docker-compose.yml"
OFFICIAL_BASE = "python:3.11-slim-bookworm"
STAND_IN = "deca-node-test-base:bookworm"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "deca-node-containers"
START_SECONDS = 60.0
BUILD_SECONDS = 1200.0
CALL_SECONDS = 240.0


class EngineError(Exception):
    """The engine, or a command of it, did not do what it should."""


@functools.cache
def unavailable() -> str:
    """Why no engine can run here; empty when one can."""
    if shutil.which("docker") is None:
        return "needs the command docker"
    if subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0:
        return ""
    missing = [name for name in ("dockerd", "containerd", "runc") if shutil.which(name) is None]
    if missing:
        return f"no engine runs, and one of our own needs {', '.join(missing)} (docker.io)"
    if os.getuid() != 0:
        return "no engine runs, and one of our own needs root"
    return ""


def compose_binary() -> Path:
    """Compose itself, as its Python package carries it."""
    return Path(sys.executable).with_name("docker-compose")


class Engine:
    """An engine, and the few things that tests ask of it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = {**os.environ, **environment}

    def run(self, *words: str, timeout: float = CALL_SECONDS, **more: str) -> str:
        """A command of the docker client; what it printed.

        Raises:
            EngineError: it failed, or took too long.
        """
        try:
            done = subprocess.run(
                ["docker", *words],
                cwd=REPOSITORY,
                env={**self.environment, **more},
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            said = b"".join(part or b"" for part in (error.stdout, error.stderr)).decode()
            raise EngineError(f"docker {' '.join(words)}: over {timeout} s\n{said}") from None
        if done.returncode:
            raise EngineError(
                f"docker {' '.join(words)}:\n{done.stdout[-4000:]}{done.stderr[-8000:]}"
            )
        return done.stdout

    def base_image(self) -> str:
        """The official base image, or what stands in for it where it cannot be had."""
        for image in (OFFICIAL_BASE, STAND_IN):
            with contextlib.suppress(EngineError):
                self.run("image", "inspect", image)
                return image
        with contextlib.suppress(EngineError):
            self.run("pull", OFFICIAL_BASE)
            return OFFICIAL_BASE
        self._make_stand_in()
        return STAND_IN

    def _make_stand_in(self) -> None:
        """Debian with its Python, and with this machine's way to packages: pip's settings, CAs."""
        root = CACHE / "base.tar"
        if not root.exists():
            partial = root.with_suffix(".partial.tar")
            command = ["mmdebstrap", "--quiet", "--variant=minbase"]
            command += ["--include=python3,python3-venv,ca-certificates"]
            command += ["--dpkgopt=force-unsafe-io"]
            command += [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "man")]
            done = subprocess.run(
                [*command, "bookworm", str(partial)],
                capture_output=True,
                text=True,
                timeout=BUILD_SECONDS,
                check=False,
            )
            if done.returncode:
                raise EngineError(f"mmdebstrap: {done.stderr[-4000:]}")
            partial.replace(root)
        self.run("import", str(root), f"{STAND_IN}-raw", timeout=BUILD_SECONDS)
        with tempfile.TemporaryDirectory() as folder:
            context = Path(folder)
            lines = [f"FROM {STAND_IN}-raw"]
            certificates = Path("/etc/ssl/certs/ca-certificates.crt")
            if certificates.exists():
                shutil.copyfile(certificates, context / "ca.crt")
                lines.append(f"COPY ca.crt {certificates}")
            found = subprocess.run(
                ["python3", "-m", "pip", "config", "list"],
                capture_output=True,
                text=True,
                check=False,
            ).stdout
            options = dict(line.split("=", 1) for line in found.splitlines() if "=" in line)
            ours = {name.rpartition(".")[2]: text.strip("'\"") for name, text in options.items()}
            pip = ["[global]", "timeout = 180"]
            pip += [f"{key} = {ours[key]}" for key in ("index-url", "cert") if key in ours]
            # Wheels on this machine's disk: one of them is PyTorch without CUDA's gigabytes.
            wheels = Path(ours.get("find-links", "/nowhere"))
            if wheels.is_dir():
                shutil.copytree(wheels, context / "wheels")
                lines.append(f"COPY wheels {wheels}")
                pip.append(f"find-links = {wheels}")
            (context / "pip.conf").write_text("\n".join([*pip, ""]))
            lines.append("COPY pip.conf /etc/pip.conf")
            (context / "Dockerfile").write_text("\n".join([*lines, ""]))
            self.run("build", "--quiet", "--tag", STAND_IN, folder, timeout=BUILD_SECONDS)


@contextlib.contextmanager
def running() -> Iterator[Engine]:
    """An engine for as long as the context lasts; one that ran before goes on afterwards."""
    with tempfile.TemporaryDirectory(prefix="deca-engine-") as folder:
        plugins = Path(folder) / "config" / "cli-plugins"
        plugins.mkdir(parents=True)
        (plugins / "docker-compose").symlink_to(compose_binary())
        environment = {"DOCKER_CONFIG": str(plugins.parent)}
        if subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0:
            yield Engine(environment)
            return
        CACHE.mkdir(parents=True, exist_ok=True)
        # Two engines on one folder would destroy it.
        with (
            filelock.FileLock(CACHE / "lock", timeout=BUILD_SECONDS),
            _own(Path(folder)) as socket,
        ):
            yield Engine({**environment, "DOCKER_HOST": socket})


@contextlib.contextmanager
def _own(folder: Path) -> Iterator[str]:
    """An engine of ours; where it listens."""
    socket, log = f"unix://{folder}/docker.sock", folder / "log"
    bridge = Path("/sys/class/net/docker0")
    was_there = bridge.exists()
    command = ["dockerd", "--data-root", str(CACHE / "data"), "--exec-root", str(folder / "exec")]
    command += ["--host", socket, "--pidfile", str(folder / "pid")]
    with log.open("wb") as file:
        daemon = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    try:
        limit = time.monotonic() + START_SECONDS
        engine = Engine({"DOCKER_HOST": socket})
        while True:
            with contextlib.suppress(EngineError):
                engine.run("info")
                break
            if daemon.poll() is not None or time.monotonic() > limit:
                raise EngineError(f"dockerd did not start:\n{log.read_text()[-4000:]}")
            time.sleep(0.2)  # between two questions to another process
        yield socket
    finally:
        daemon.terminate()
        daemon.wait(START_SECONDS)
        if bridge.exists() and not was_there:
            subprocess.run(["ip", "link", "delete", bridge.name], check=False)
