"""Experiment files: what they ask for, and what is wrong with them."""

from contextlib import nullcontext
from pathlib import Path

import pytest

from deca_node import experiment
from deca_node.errors import ConfigError
from deca_node.limits import MAX_MEMBERS

BASE = """
[experiment]
name = "small"
nodes = 4
seeds = [1, 2]
[rehearsal]
rows = 100
"""


def write(folder, text, base=BASE):
    path = folder / "experiment.toml"
    path.write_text(base + text)
    return path


def read(folder, text, base=BASE):
    return experiment.read(write(folder, text, base), folder / "out")


def test_a_grid_is_the_product_of_its_lists_once_for_each_seed(tmp_path):
    """Dotted settings of nodes and of their world alike."""
    found = read(tmp_path, '[grid]\noptimizer.bma = ["on", "off"]\nexperiment.nodes = [2, 4]\n')
    assert len(found.cells) == 8
    assert len({cell.name for cell in found.cells}) == 8
    last = found.cells[-1]
    assert (last.settings.optimizer.bma, last.world.experiment.nodes, last.seed) == ("off", 4, 2)
    assert last.settings.run.seed == 2
    assert last.nodes == ["node-0", "node-1", "node-2", "node-3"]


def test_several_grids_are_one_after_the_other(tmp_path):
    """A setting that only makes sense with some values of another is not multiplied out."""
    found = read(
        tmp_path,
        '[[grid]]\noptimizer.bma = ["on"]\noptimizer.discrepancy = ["l2", "none"]\n'
        '[[grid]]\noptimizer.bma = ["off"]\n',
    )
    assert [dict(cell.values) for cell in found.cells[::2]] == [
        {"optimizer.bma": "on", "optimizer.discrepancy": "l2"},
        {"optimizer.bma": "on", "optimizer.discrepancy": "none"},
        {"optimizer.bma": "off"},
    ]


def test_variables_of_the_environment_change_nothing(tmp_path, monkeypatch):
    """An experiment is what its file says."""
    monkeypatch.setenv("DECA_OPTIMIZER__LEARNING_RATE", "7.0")
    assert read(tmp_path, "").cells[0].settings.optimizer.learning_rate == 2e-3


def test_paths_are_relative_to_the_file(tmp_path):
    """As in node.toml."""
    base = '[model]\npath = "models/m"\n[data]\ntrain = "all.jsonl"\n'
    settings = read(tmp_path, "", base).cells[0].settings
    assert settings.model.path == tmp_path / "models/m"
    assert settings.data.train == tmp_path / "all.jsonl"


def test_seeds_and_values_may_be_added_but_nothing_else_changes(tmp_path):
    """What makes a folder of results another experiment's."""
    grid = "[grid]\nlinks.loss = [0.0, 0.1]\n"
    first = read(tmp_path, grid).identity({})
    more = BASE.replace("[1, 2]", "[1, 2, 3]")
    assert read(tmp_path, "[grid]\nlinks.loss = [0.2]\n", more).identity({}) == first
    assert read(tmp_path, grid + "[schedule]\nsteps = 3\n").identity({}) != first
    assert read(tmp_path, "[grid]\nlinks.delay = [0.2]\n").identity({}) != first


def test_where_files_lie_makes_no_other_experiment(tmp_path):
    """What they hold does."""
    base = '[model]\npath = "m"\n[data]\ntrain = "all.jsonl"\n'
    first, moved = (read(tmp_path, "", base.replace('"m"', name)) for name in ('"m"', '"n"'))
    assert moved.identity({"model": "1"}) == first.identity({"model": "1"})
    assert moved.identity({"model": "2"}) != first.identity({"model": "1"})


def test_everybody_greets_everybody_only_among_few(tmp_path):
    """Beyond, nodes greet their neighbours alone, unless told otherwise."""
    few, many = (BASE.replace("nodes = 4", f"nodes = {n}") for n in (32, 33))
    assert read(tmp_path, "", few).cells[0].everybody
    assert not read(tmp_path, "", many).cells[0].everybody
    told = many.replace("[rehearsal]", 'greetings = "everybody"\n[rehearsal]')
    assert read(tmp_path, "", told).cells[0].everybody


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[schedul]\nsteps = 3\n", "unknown setting 'schedul.steps'; did you mean"),
        ("[links]\nlos = 0.1\n", "unknown setting 'links.los'; did you mean 'links.loss'?"),
        ("[links]\nloss = 1.0\n", "links.loss = 1.0"),
        ('[links]\nloss = "0.1"\n', "a number is needed, without quotes"),
        ('[run]\nmethod = "magic"\n', 'run.method = "magic"'),
        ("[run]\nseed = 3\n", "give experiment.seeds"),
        ("[node]\nport = 3\n", "node.port is set by the simulation"),
        ("[consensus]\ntolerance = 0.1\n", "the agreement after the last round is not simulated"),
        ("[grid]\noptimizer.bm = ['on']\n", "grid: unknown setting 'optimizer.bm'"),
        ("[grid]\noptimizer.bma = 'on'\n", "write a list of values"),
        ("[grid]\noptimizer.bma = []\n", "write a list of values"),
        ("[grid]\noptimizer.bma = ['on', 'on']\n", "twice"),
        ("[grid]\noptimizer.bma = ['of']\n", 'optimizer.bma = "of"'),
        ("[grid]\nmodel.dtype = ['bf16']\n", "the same for a whole experiment"),
        ("grid = 3\n", "write [grid]"),
        (
            '[topology]\nkind = "explicit"\nedges = [["node-0", "node-1"], ["node-2", "node-3"]]\n',
            "not connected: no way from node-0 to node-2",
        ),
        ('[topology]\nkind = "explicit"\nedges = [["node-0", "bob"]]\n', "names 'bob'"),
        ("[compute.nodes]\nnode-9 = 3.0\n", "compute.nodes names 'node-9'"),
        ("[faults.deaths]\nnode-1 = [3.0, 2.0]\n", "write [second of death]"),
        ("[faults.deaths]\nnode-1 = [3.0, 3.0]\n", "write [second of death]"),
        ("[faults.deaths]\nnode-1 = [nan]\n", "write [second of death]"),
        ("[faults.deaths]\nnode-1 = [3.0, inf]\n", "write [second of death]"),
        ("[metrics]\nport = 9000\n", "`deca-node report` shows"),
        (
            '[data]\ntest = "t.jsonl"\n[partition]\ntest_per_label = 3\n',
            "no effect beside data.test",
        ),
        ('[model]\npath = "m"\n', "give either rehearsal.rows or model.path"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, text, words):
    """The file, the setting and the remedy."""
    base = text + BASE if text.startswith("grid") else BASE
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, "" if text.startswith("grid") else text, base)
    assert words in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seeds", ["[0, 0]", "[-1]"])
def test_seeds_are_whole_numbers_each_once(tmp_path, seeds):
    """The setting that the user wrote is named."""
    path = tmp_path / "experiment.toml"
    path.write_text(f"experiment.seeds = {seeds}\nrehearsal.rows = 9\n")
    with pytest.raises(ConfigError, match=r"experiment\.seeds"):
        experiment.read(path, tmp_path)


def test_what_has_no_effect_beside_ready_shards_is_refused(tmp_path):
    """In a grid its cells would be the same run under several names."""
    path = tmp_path / "experiment.toml"
    path.write_text(
        'model.path = "m"\npartition.shards = "."\n[grid]\npartition.alpha = [0.1, 1.0]\n'
    )
    with pytest.raises(ConfigError, match=r"alpha has no effect beside partition\.shards"):
        experiment.read(path, tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            '[grid]\ntopology.kind = ["ring", "erdos_renyi"]\ntopology.p = [0.3]\n',
            'topology.p has no effect where topology.kind is "ring"; vary it in a [[grid]] of its '
            "own, without that topology.kind",
        ),
        (
            "[grid]\ntopology.p = [0.3, 0.5]\n",
            'topology.p has no effect where topology.kind is "ring"; leave it out, or set '
            'topology.kind = "erdos_renyi"',
        ),
        (
            '[optimizer]\nbma = "off"\n[grid]\noptimizer.discrepancy = ["l2", "none"]\n',
            'optimizer.discrepancy has no effect where optimizer.bma is "off"; leave it out, or '
            'set optimizer.bma = "on"',
        ),
        (
            '[grid]\noptimizer.bma = ["on", "trivial"]\noptimizer.bma_beta1 = [0.1]\n',
            'optimizer.bma_beta1 has no effect where optimizer.bma is "trivial"; vary it in a '
            "[[grid]] of its own, without that optimizer.bma",
        ),
        (
            "[grid]\naggregation.hostile = [1, 2]\n",
            'aggregation.hostile has no effect where aggregation.rule is "mean"; leave it out, or '
            'set aggregation.rule = "clipped"',
        ),
        (
            '[aggregation]\nrule = "trimmed"\n[grid]\naggregation.tau = [0.0, 1.0]\n',
            'aggregation.tau has no effect where aggregation.rule is "trimmed"; leave it out, or '
            'set aggregation.rule = "clipped"',
        ),
        (
            "[grid]\nnetwork.send_rate = [1.0]\n",
            "network.send_rate has no effect in a simulation; give links.bandwidth",
        ),
        (
            '[grid]\ntrust.allow = [["a"], ["b"]]\n',
            "trust.allow has no effect in a simulation; leave it out",
        ),
    ],
)
def test_a_grid_over_what_changes_nothing_is_refused(tmp_path, text, words):
    """Its cells would be the same run under several names."""
    path = tmp_path / "experiment.toml"
    path.write_text(f"rehearsal.rows = 9\n{text}")
    with pytest.raises(ConfigError) as caught:
        experiment.read(path, tmp_path)
    assert str(caught.value) == f"{path}: grid: {words}"


def test_more_than_the_bound_of_members_cannot_all_greet(tmp_path):
    """The bound is the daemons'."""
    for nodes, enough in ((MAX_MEMBERS, True), (MAX_MEMBERS + 1, False)):
        base = BASE.replace("nodes = 4", f'nodes = {nodes}\ngreetings = "everybody"')
        with nullcontext() if enough else pytest.raises(ConfigError, match="greetings"):
            read(tmp_path, "", base)


def test_the_examples_can_be_read():
    """Every committed experiment, as far as it can be without its model and data."""
    folder = Path(__file__).parents[2] / "examples" / "experiments"
    files = sorted(folder.glob("*.toml"))
    assert files
    for file in files:
        assert experiment.read(file, Path("out")).cells
