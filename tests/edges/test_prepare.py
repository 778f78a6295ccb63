"""What the compose file's first container prepares, with a small model in place of the demo's."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch

from deca_node.config import load
from deca_node.keyring import Keyring
from deca_node.models import LanguageModel
from tests.edges.test_models import write_gguf
from tests.tiny import make_model

REPOSITORY = Path(__file__).parents[2]
TOPICS = ("business", "entertainment", "politics", "sports", "tech")


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """compose/prepare.py with its volumes in a folder."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples"))
    spec = importlib.util.spec_from_file_location("prepare", REPOSITORY / "compose/prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("swarm", "authority", "own", *(f"nodes/node-{number}" for number in range(3))):
        (tmp_path / name).mkdir(parents=True)
    for name in ("SWARM", "NODES", "AUTHORITY", "OWN"):
        monkeypatch.setattr(module, name, tmp_path / name.lower())
    monkeypatch.setattr(module, "WORK", module.SWARM / ".work")
    monkeypatch.setenv("NODES", "3")
    return module


@pytest.fixture
def small_demo(tmp_path, monkeypatch, prepare):
    """The demo's packages, in small."""
    import bbc_demo

    source = make_model(tmp_path / "source", "llama", layers=2)
    file = tmp_path / "Small.gguf"
    write_gguf(file, LanguageModel.load(load_model(source), torch.device("cpu")))
    package = tmp_path / "corpus/bbcnews/data"
    for topic in TOPICS:
        (package / topic).mkdir(parents=True)
        for number in range(bbc_demo.TEST_PER_TOPIC + 6):
            (package / topic / f"{number}.txt").write_text(f"{topic} {number}\nand more")
    monkeypatch.setattr(bbc_demo, "find_model", lambda: file)
    monkeypatch.setattr(bbc_demo, "package_folder", lambda _: tmp_path / "corpus")


def load_model(folder):
    return load(None, [f"model.path={folder}", "data.train=x", "model.dtype=fp32"]).model


@pytest.mark.parametrize(("demo", "run"), [("bbc", "bbc-demo"), ("rehearsal", "rehearsal")])
def test_each_node_finds_what_its_settings_name(prepare, small_demo, monkeypatch, demo, run):
    """Settings, model, rows and a certificate; once: not again, and not for another swarm."""
    monkeypatch.setenv("DEMO", demo)
    prepare.main()
    assert sorted(path.suffix for path in prepare.SWARM.iterdir() if path.is_file()) == [
        ".json",
        ".jsonl",
        ".toml",
    ]
    for number in range(3):
        name, volume = f"node-{number}", prepare.NODES / f"node-{number}"
        settings = load(
            prepare.SWARM / "swarm.toml",
            [
                f"node.name={name}",
                f"data.train={volume / 'train.jsonl'}",
                f"trust.folder={volume / 'trust'}",
            ],
        )
        assert settings.run.name == run
        assert settings.data.test.exists()
        labels = {json.loads(row)["label"] for row in settings.data.train.open()}
        assert labels <= set(settings.data.labels)
        keyring = Keyring.of_run(settings.trust_folder(), run)
        assert set(keyring.nodes()) == {name}
        assert not keyring.has_authority
    model = LanguageModel.load(settings.model, torch.device("cpu"))
    assert model.n_layers > 1
    assert Keyring(prepare.AUTHORITY).has_operator

    kept = (prepare.SWARM / "prepared.json").read_text()
    prepare.main()
    monkeypatch.setenv("NODES", "2")
    with pytest.raises(SystemExit, match=r"a swarm of 3 nodes \(\w+\), wanted are 2"):
        prepare.main()
    assert (prepare.SWARM / "prepared.json").read_text() == kept


def test_a_power_cut_leaves_no_mark_or_a_whole_one(prepare, monkeypatch):
    """And a whole one only when all that it tells of is on the disk."""
    monkeypatch.setenv("DEMO", "own")
    (prepare.OWN / "swarm.toml").write_text('run.name = "mine"\n')
    for number in range(3):
        (prepare.OWN / f"node-{number}.jsonl").touch()
    mark, synced, sync = prepare.SWARM / "prepared.json", [], os.fsync
    monkeypatch.setattr(os, "sync", lambda: synced.append(sorted(prepare.SWARM.iterdir())))

    class PowerCut(BaseException):
        pass

    def cut(descriptor):
        if any(prepare.SWARM.glob("prepared.json*")):
            raise PowerCut
        sync(descriptor)

    with monkeypatch.context() as weak:
        weak.setattr(os, "fsync", cut)
        with pytest.raises(PowerCut):
            prepare.main()
    assert not mark.exists()
    assert synced == [[prepare.SWARM / "swarm.toml"]]
    prepare.main()
    assert json.loads(mark.read_text()) == {"nodes": 3, "demo": "own"}
