"""Settings: who wins, what is refused and how it is said."""

import re
import tomllib
from pathlib import Path

import pytest

from deca_node.blocks import Schedule, partition_layers
from deca_node.config import KEYS, Timing, load
from deca_node.config.keys import kinds_of
from deca_node.errors import ConfigError
from deca_node.fingerprint import agreement_marks, difference, fingerprint

GOOD = '[model]\npath = "model"\n[data]\ntrain = "train.jsonl"\n'


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "node.toml"
    path.write_text(GOOD)
    return path


def test_later_sources_win(file, monkeypatch):
    """Defaults, file, environment, --set."""
    file.write_text(GOOD + "[schedule]\nsteps = 2\nrounds = 2\norder = 'random'\n")
    monkeypatch.setenv("DECA_SCHEDULE__STEPS", "3")
    monkeypatch.setenv("DECA_SCHEDULE__ROUNDS", "3")
    schedule = load(file, ["schedule.steps=4"]).schedule
    assert (schedule.steps, schedule.rounds, schedule.order) == (4, 3, "random")
    assert schedule.layers_per_block == 1


def test_the_labels_of_a_later_source_are_all_there_are(file, monkeypatch):
    """Who names other labels for once does not get the file's among them."""
    file.write_text(f"{GOOD}[data.labels]\na = 'A'\n")
    assert load(file).data.labels == {"a": "A"}
    monkeypatch.setenv("DECA_DATA__LABELS", '{"b": "B"}')
    assert load(file).data.labels == {"b": "B"}
    assert load(file, ['data.labels={c="C"}']).data.labels == {"c": "C"}
    assert load(file, ["data.labels={}"]).data.labels == {}


def test_paths_in_a_file_are_relative_to_it(file):
    """A file can be used from anywhere; --set is relative to where one stands."""
    assert load(file).model.path == file.parent / "model"
    assert load(file, ["model.path=other"]).model.path == Path("other")


def test_everything_can_come_from_the_environment(monkeypatch):
    """A container needs no file."""
    monkeypatch.setenv("DECA_MODEL__PATH", "/m")
    monkeypatch.setenv("DECA_DATA__TRAIN", "/d")
    monkeypatch.setenv("DECA_NETWORK__STATIC_PEERS", '["a:1"]')
    monkeypatch.setenv("DECA_DATA__LABELS", '{"x": "y"}')
    settings = load()
    assert settings.network.static_peers == ("a:1",)
    assert settings.data.labels == {"x": "y"}


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        (GOOD + "[optimiser]\nlearning_rate = 1\n", [], "'optimizer.learning_rate'"),
        (GOOD + "[run]\nsed = 1\n", [], "did you mean 'run.seed'?"),
        (GOOD + "[run\n", [], "not valid TOML"),
        (GOOD + "[run]\nseed = 'x'\n", [], 'run.seed = "x"'),
        (GOOD + "[schedule]\nsteps = 0\n", [], "schedule.steps = 0"),
        (GOOD, ["run.name=No Spaces"], "run.name"),
        (
            GOOD,
            ['data.labels=["neg","pos"]'],
            'each label with its word, as in {neg = "neg"}',
        ),
        (GOOD, ["data.labels={a=b}"], 'each label with its word, as in {neg = "neg"}'),
        (GOOD, ["data.labels={a=1}"], "data.labels.a = 1: Input should be a valid string"),
        (GOOD, ["optimizer.learning_rate=inf"], "optimizer.learning_rate"),
        (
            GOOD,
            ['topology.edges=[["a","b"]]'],
            'topology.edges = [["a", "b"]]: used with topology.kind = "explicit" only; set '
            'topology.kind = "explicit", or remove topology.edges',
        ),
        (GOOD, ["network.static_peers=['nowhere']"], "HOST:PORT"),
        (GOOD, ["run.seed"], "--set section.key=value"),
        (GOOD + "[schedule]\nsteps = '3'\n", [], 'steps = "3": a number is needed'),
        (GOOD + "[schedule]\nsteps = true\n", [], "steps = true: a number is needed"),
        (GOOD + "[network]\nzeroconf = 'no'\n", [], "true or false is needed"),
        (GOOD + "[run]\nname = 7\n", [], "node.toml: run.name = 7"),
        (GOOD, ["schedule.steps=true"], "--set schedule.steps = true: a number is needed"),
        (GOOD, ["schedule.steps=1\nschedule.rounds=9"], "--set schedule.steps: more than one"),
        (GOOD, ["run.name=Big_Name"], 'run.name = "Big_Name": use 1 to 48 characters of a-z'),
        (GOOD, ["node.device=gpu"], "use auto, cpu, cuda, cuda:N (as cuda:0) or mps"),
        (
            GOOD,
            ["topology.kind=explicit", 'topology.edges=[["a","b"],["c","d"],["b","e"]]'],
            "not connected: no way from c to a",
        ),
        (
            GOOD,
            ["topology.kind=explicit", 'topology.edges=[["a","a"]]'],
            '--set topology.edges = [["a", "a"]]: \'a\' needs no edge to itself',
        ),
        (GOOD, ["network.heartbeat=16"], "network.heartbeat = 16: Input should be less than"),
        (
            GOOD,
            ["network.heartbeat=12", "network.gone_after=20"],
            "--set network.heartbeat = 12.0: more than half of network.gone_after = 20.0, so that "
            "peers would be gone between two greetings; lower it, or raise network.gone_after",
        ),
        (
            GOOD + "[network]\ngone_after = 19\npreset = 'wan'\n",
            [],
            "node.toml: network.gone_after = 19.0: less than twice network.heartbeat = 10.0, so",
        ),
        (GOOD, ['topology.edges=[["a"]]'], 'topology.edges: write it as a list, as in [["alice"'),
        (GOOD, ["network.static_peers=h:5"], 'write it as a list, as in ["host:7430"]'),
        (GOOD, ["network.static_peers=['h:99999']"], "'h:99999' is not HOST:PORT"),
        (GOOD, ["node.advertise=h:5"], "a host name or an IP address without a port"),
        (GOOD, ["node.advertise_port=0"], "node.advertise_port"),
        (GOOD, ["node.advertise=[::1]"], "a host name or an IP address without a port"),
        (GOOD, ["model.cache=~no-such-user/x"], "cannot expand ~: no home directory"),
        ("", [], "'model.path' is missing"),
        ("[model]\npath = 'm'\n", [], "'data.train' is missing"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(file, text, overrides, words):
    """The file, the key and the nearest valid name or the rule that was broken."""
    file.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        load(file, overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["schedule.steps", "network.heartbeat"])
def test_the_source_of_a_wrong_value_is_named(file, monkeypatch, key):
    """The one that won, be the others right or wrong."""
    section, _, name = key.partition(".")
    file.write_text(f"{GOOD}[{section}]\n{name} = -1\n")
    with pytest.raises(ConfigError, match=f"^{re.escape(str(file))}: {key} = -1: "):
        load(file)
    variable = f"DECA_{section}__{name}".upper()
    monkeypatch.setenv(variable, "-2")
    with pytest.raises(ConfigError, match=f'^environment variable {variable}: {key} = "-2": '):
        load(file)
    with pytest.raises(ConfigError, match=f"^--set {key} = -3: "):
        load(file, [f"{key}=-3"])
    assert load(file, [f"{key}=3"])


def test_home_is_understood_wherever_a_path_is_given(file, monkeypatch):
    """By all settings that are paths, from all sources."""
    monkeypatch.setenv("HOME", "/home/alice")
    monkeypatch.setenv("DECA_DATA__TEST", "~/test.jsonl")
    file.write_text("[model]\npath = '~/model'\n[data]\ntrain = 'train.jsonl'\n")
    settings = load(file, ["node.output=~/out"])
    assert settings.model.path == Path("/home/alice/model")
    assert settings.model.cache == Path("/home/alice/.cache/deca-node")
    assert settings.data.test == Path("/home/alice/test.jsonl")
    assert settings.data.train == file.parent / "train.jsonl"
    assert settings.node.output == Path("/home/alice/out")


PATHS = [key for key in KEYS if Path in kinds_of(KEYS[key])]


@pytest.mark.parametrize("key", PATHS)
def test_an_empty_path_is_none(file, monkeypatch, key):
    """pathlib takes it for the working folder, and in a file it would be the file's."""
    assert len(PATHS) == 7
    words = re.escape(f'{key} = "": is empty; name a path or leave it out')
    with pytest.raises(ConfigError, match=f"^--set {words}$"):
        load(file, [f"{key}="])
    section, _, name = key.partition(".")
    variable = f"DECA_{section}__{name}".upper()
    with monkeypatch.context() as patch:
        patch.setenv(variable, "")
        with pytest.raises(ConfigError, match=f"^environment variable {variable}: {words}$"):
            load(file)
    tables = tomllib.loads(GOOD)
    tables.setdefault(section, {})[name] = ""
    lines = [f"{one}.{key} = '{v}'\n" for one, table in tables.items() for key, v in table.items()]
    file.write_text("".join(lines))
    with pytest.raises(ConfigError, match=f"^{re.escape(str(file))}: {words}$"):
        load(file)
    assert load(file, [f"{key}=."])


@pytest.mark.parametrize("variable", ["DECA_DATA__LABELS__Sports", "DECA_DATA__LABELS__sports"])
def test_a_tables_keys_are_not_taken_from_variables_names(file, monkeypatch, variable):
    """Their case would be lost, which no label may be; a JSON object has them as they are."""
    monkeypatch.setenv(variable, "sport")
    name = variable.rpartition("__")[2]
    words = f'write DECA_DATA__LABELS as a JSON object, as in {{"{name}": "sport"}}'
    with pytest.raises(
        ConfigError, match=f"^environment variable {variable}: .*{re.escape(words)}$"
    ):
        load(file)
    monkeypatch.delenv(variable)
    monkeypatch.setenv("DECA_DATA__LABELS", f'{{"{name}": "sport"}}')
    assert load(file).data.labels == {name: "sport"}


def test_text_may_look_like_a_number(file):
    """With --set, which knows what a setting is; quotes still are TOML's."""
    overrides = ["run.name=2024", "node.name='123'", "node.output=7", "data.label_field=true"]
    settings = load(file, overrides)
    assert (settings.run.name, settings.node.name) == ("2024", "123")
    assert settings.node.output == Path("7")
    assert settings.data.label_field == "true"


@pytest.mark.parametrize("host", ["192.0.2.7", "2001:db8::7", "box-1.lan", "my_host"])
def test_hosts_that_others_can_call(file, host):
    """Names and addresses of both kinds."""
    assert load(file, [f"node.advertise={host}"]).node.advertise == host


def test_who_is_on_a_network_needs_certificates_and_keeps_them_elsewhere(file):
    """What lies in node.output may be given away, but where there is no key nothing is said."""
    inside = ["node.output=out", "trust.folder=out/trust"]
    for host, insecure in (("127.0.0.1", False), ("0.0.0.0", True)):
        settings = load(
            file, [*inside, f"node.host={host}", f"trust.insecure={str(insecure).lower()}"]
        )
        assert not settings.needs_trust()
    assert load(file, ["node.host=0.0.0.0"]).needs_trust()
    with pytest.raises(ConfigError, match=r"lies within node\.output"):
        load(file, [*inside, "node.host=0.0.0.0"])
    load(file, ["node.output=trust/out", "trust.folder=trust", "node.host=0.0.0.0"])


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("DECA_RUN__SEDD", "1", "DECA_RUN__SEED"),
        ("DECA_NETWORK__STATIC_PEERS", "a:1", "STATIC_PEERS: 'a:1' is not a JSON list"),
        ("DECA_RUN__SEED", "many", "run.seed"),
    ],
)
def test_mistakes_in_variables_are_named(file, monkeypatch, variable, value, words):
    """An unknown or ill-typed variable is as wrong as a line of the file."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=words):
        load(file)


def test_presets_can_be_adjusted(file):
    """A deadline given by itself replaces the preset's, and only that."""
    timing = load(file, ["network.preset=wan", "network.step_deadline=7"]).timing()
    assert timing.step_deadline == 7
    assert timing.visit_deadline == Timing.wan().visit_deadline


def test_how_nodes_agree_is_compared_but_makes_no_other_run(file):
    """A finished run is agreed on once more under another tolerance."""
    found = difference(
        agreement_marks(load(file)), agreement_marks(load(file, ["consensus.tolerance=1e-3"]))
    )
    assert found == "consensus.tolerance is '0.0' here, '0.001' there"
    with pytest.raises(ConfigError, match=r"consensus\.tolerance = 1"):
        load(file, ["consensus.tolerance=1"])


def test_the_fingerprint_tells_what_matters_and_nothing_else(file):
    """Hyperparameters are compared, names, paths and addresses are not."""

    def marks(*overrides):
        settings = load(file, overrides)
        schedule = Schedule(
            partition_layers(4, settings.schedule.layers_per_block),
            settings.schedule.rounds,
            settings.schedule.steps,
            settings.schedule.order,
            settings.run.seed,
        )
        return fingerprint(settings, schedule, "c", "w", "t", "fp32")

    own = marks()
    for private in (
        "node.name=x",
        "data.batch_size=9",
        "network.preset=wan",
        "node.port=1",
        "consensus.tolerance=0.001",  # see agreement_marks
        "topology.p=0.25",  # of a random graph only
    ):
        assert difference(own, marks(private)) is None
    random_graph = "topology.kind=erdos_renyi"
    found = difference(marks(random_graph), marks(random_graph, "topology.p=0.25"))
    assert found is not None
    assert "0.25" in found
    for key, value in {
        "run.name": "other",
        "run.seed": 9,
        "schedule.rounds": 7,
        "schedule.steps": 7,
        "schedule.order": "random",
        "schedule.layers_per_block": 2,
        "optimizer.learning_rate": 0.5,
        "optimizer.adam_beta1": 0.5,
        "optimizer.adam_beta2": 0.5,
        "optimizer.adam_eps": 0.5,
        "optimizer.bma": "off",
        "optimizer.bma_beta1": 0.5,
        "optimizer.bma_beta2": 0.5,
        "optimizer.discrepancy": "lr",
        "topology.kind": "full",
    }.items():
        found = difference(own, marks(f"{key}={value}"))
        assert found is not None, key
        assert str(value) in found
