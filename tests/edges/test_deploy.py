"""The manifests of deploy/ and the compose file, as far as they can be looked at unrun."""

import asyncio
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml

from deca_node.transport.server import GrpcTransport

REPOSITORY = Path(__file__).parents[2]
DEPLOY = REPOSITORY / "deploy"
COMPOSE_FILE = REPOSITORY / "compose/docker-compose.yml"
BASE, GPU = DEPLOY / "kubernetes", DEPLOY / "kubernetes-gpu"
KUBECTL = shutil.which("kubectl")


def pod(manifest):
    """The containers of a StatefulSet, as name -> container."""
    spec = manifest["spec"]["template"]["spec"]
    return {one["name"]: one for one in [*spec["initContainers"], *spec["containers"]]}


@pytest.mark.parametrize(
    "path", sorted(DEPLOY.rglob("kustomization.yaml")), ids=lambda p: p.parent.name
)
def test_a_kustomization_names_files_that_are_there_and_no_folder_around_it(path):
    """What contains the folder itself is a cycle, which kubectl refuses."""
    here = yaml.safe_load(path.read_text())
    named = here["resources"] + [patch["path"] for patch in here.get("patches", ())]
    for name in named:
        found = (path.parent / name).resolve()
        assert found.exists(), name
        assert not path.resolve().is_relative_to(found), name


def test_the_image_for_gpus_is_named_in_one_place():
    """Each container gets the name that `images` looks for, whatever the base has made of it."""
    base = yaml.safe_load((BASE / "statefulset.yaml").read_text())
    patch = yaml.safe_load((GPU / "gpu.yaml").read_text())
    [image] = yaml.safe_load((GPU / "kustomization.yaml").read_text())["images"]
    assert {name: one["image"] for name, one in pod(patch).items()} == dict.fromkeys(
        pod(base), image["name"]
    )


@pytest.mark.skipif(KUBECTL is None, reason="kubectl is not installed")
def test_kubectl_builds_both_also_with_images_of_other_names(tmp_path):
    """As docs/kubernetes.md has them named."""
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    for folder, name in (("kubernetes", "registry.example/cpu"), ("kubernetes-gpu", "gpu")):
        path = tmp_path / "deploy" / folder / "kustomization.yaml"
        path.write_text(path.read_text().replace("newName: deca-node", f"newName: {name}"))
    for folder, image in (
        ("kubernetes", "registry.example/cpu:latest"),
        ("kubernetes-gpu", "gpu:cuda"),
    ):
        done = subprocess.run(
            [KUBECTL, "kustomize", tmp_path / "deploy" / folder],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        built = list(yaml.safe_load_all(done.stdout))
        [swarm] = [one for one in built if one["kind"] == "StatefulSet"]
        assert {one["image"] for one in pod(swarm).values()} == {image}
        limits = pod(swarm)["node"]["resources"]["limits"]
        assert ("nvidia.com/gpu" in limits) == (folder == "kubernetes-gpu")


@pytest.fixture
def prepare(tmp_path):
    """Runs the first container's script, its folders moved; what it printed and its exit code."""
    base = yaml.safe_load((BASE / "statefulset.yaml").read_text())
    one = pod(base)["prepare"]
    script = one["args"][0]
    for folder in ("/data", "/secret"):
        (tmp_path / folder[1:]).mkdir()
        script = script.replace(folder, f"{tmp_path}{folder}")
    (tmp_path / "data/model").mkdir()
    (tmp_path / "data/model/config.json").touch()
    (tmp_path / "data/train.jsonl").touch()

    def run(path=None):
        surroundings = {**os.environ, "POD": "deca-1", "PATH": path or os.environ["PATH"]}
        ran = subprocess.run(
            [*one["command"], script],
            env=surroundings,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return ran.stdout + ran.stderr, ran.returncode

    return run


def test_a_pod_gets_its_certificate_once(prepare, tmp_path):
    """What is renewed in its volume stays."""
    for name in ("authority.pem", "node.pem", "node.key"):
        (tmp_path / "secret" / name).write_text(name)
    assert prepare() == ("", 0)
    trust = tmp_path / "data/trust"
    (trust / "nodes/deca-1.pem").write_text("renewed")
    assert prepare() == ("", 0)
    files = {p.relative_to(trust).as_posix(): p.read_text() for p in trust.rglob("*.*")}
    assert files == {
        "authority.pem": "authority.pem",
        "nodes/deca-1.pem": "renewed",
        "nodes/deca-1.key": "node.key",
    }
    assert {p.stat().st_mode & 0o777 for p in trust.rglob("*.*")} == {0o600}


def test_a_pod_whose_certificate_comes_late_gets_it_at_its_next_start(prepare, tmp_path):
    """In place of a key that the secret does not have there is a folder."""
    (tmp_path / "secret/authority.pem").write_text("authority")
    for name in ("node.pem", "node.key"):
        (tmp_path / "secret" / name).mkdir()
    told, code = prepare()
    assert code == 1
    assert "secret deca-trust has no deca-1.pem" in told
    for name in ("node.pem", "node.key"):
        (tmp_path / "secret" / name).rmdir()
        (tmp_path / "secret" / name).write_text(name)
    assert prepare() == ("", 0)
    assert (tmp_path / "data/trust/nodes/deca-1.pem").read_text() == "node.pem"


@pytest.mark.parametrize("copied", range(4))
def test_a_pod_that_is_killed_while_it_copies_goes_on_at_its_next_start(copied, prepare, tmp_path):
    for name in ("authority.pem", "node.pem", "node.key"):
        (tmp_path / "secret" / name).write_text(name)
    tools = tmp_path / "tools"
    tools.mkdir()
    real = shutil.which("install")
    # Kills the shell that called it before so many files are copied.
    (tools / "install").write_text(
        f"#!/bin/sh\necho >> {tmp_path}/count\n"
        f'[ $(wc -l < {tmp_path}/count) -gt {copied} ] && kill -9 $PPID\nexec {real} "$@"\n'
    )
    (tools / "install").chmod(0o755)
    assert prepare(f"{tools}:{os.environ['PATH']}")[1] == -9
    assert prepare() == ("", 0)
    for name in ("authority.pem", "nodes/deca-1.pem", "nodes/deca-1.key"):
        assert (tmp_path / "data/trust" / name).read_text()


def imported(statement):
    """The files of Python that a fresh process reads for a statement."""
    program = (
        "import sys\n"
        f"{statement}\n"
        "files = {getattr(m, '__file__', None) or '' for m in list(sys.modules.values())}\n"
        "print(*(f for f in files if f.endswith('.py')), sep='\\n')"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True
    )
    return set(ran.stdout.split("\n"))


def test_the_image_has_compiled_what_is_imported_there():
    """It is read-only: what is missing is compiled again at each start and each health check."""
    dockerfile = (REPOSITORY / "docker/Dockerfile").read_text().replace("\\\n", "")
    [statement] = re.findall(r'python -c "(import accelerate, [^"]*)"', dockerfile)
    check = (REPOSITORY / "docker/healthcheck.py").read_text()
    theirs = "; ".join(re.findall(r"^(?:import|from) .*$", check, re.MULTILINE))
    wanted = imported(f"import deca_node.cli, deca_node.node; {theirs}")
    ours = {path for path in wanted if Path(path).is_relative_to(REPOSITORY / "deca_node")}
    assert len(wanted) > 500
    assert sorted(wanted - ours - imported(statement)) == []


async def test_the_health_check_asks_no_proxy():
    """An engine that is set up for one gives its address to all containers."""
    transport = GrpcTransport("127.0.0.1", 0)
    port = await transport.listen(Mock(), None)
    surroundings = {
        **{name: value for name, value in os.environ.items() if name.lower() != "no_proxy"},
        "DECA_NODE__HEALTH_PORT": str(port),
        "http_proxy": "http://127.0.0.1:9",
    }
    asking = await asyncio.create_subprocess_exec(
        sys.executable,
        REPOSITORY / "docker/healthcheck.py",
        env=surroundings,
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await asking.communicate()
    await transport.close(0)
    assert (asking.returncode, said) == (0, b"")


def test_a_pod_that_waits_for_its_data_ends_when_it_is_told_to(prepare, tmp_path):
    """The first process of a container is spared by a signal that it has no handler for."""
    for name in ("authority.pem", "node.pem", "node.key"):
        (tmp_path / "secret" / name).write_text(name)
    (tmp_path / "data/train.jsonl").unlink()
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "sleep").write_text("#!/bin/sh\nkill -TERM $PPID\n")
    (tools / "sleep").chmod(0o755)
    assert prepare(f"{tools}:{os.environ['PATH']}") == (
        f"waiting for {tmp_path}/data/train.jsonl and {tmp_path}/data/model\n",
        143,
    )


def test_nobody_can_log_in_to_grafana():
    """Its admin has the default password: neither the form nor a request's header may use it."""
    grafana = yaml.safe_load(COMPOSE_FILE.read_text())["services"]["grafana"]["environment"]
    assert grafana["GF_AUTH_DISABLE_LOGIN_FORM"] == "true"
    assert grafana["GF_AUTH_BASIC_ENABLED"] == "false"
    assert "GF_AUTH_ANONYMOUS_ORG_ROLE" not in grafana  # Viewer
