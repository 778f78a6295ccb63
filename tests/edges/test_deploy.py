"""The manifests of deploy/, as far as they can be looked at without a cluster."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
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
