"""Which setting goes with which method."""

import pytest

from deca_node import template
from deca_node.config import load
from deca_node.errors import ConfigError
from deca_node.fingerprint import fingerprint, schedule_for


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "node.toml"
    path.write_text('[model]\npath = "m"\n[data]\ntrain = "t.jsonl"\n')
    return path


@pytest.mark.parametrize(
    ("method", "setting", "words"),
    [
        ("deca", "lora.rank=4", "lora.rank = 4: a setting of dec-lora, decaf, and run.method is"),
        ("deca", "adapter.width=4", "adapter.width = 4: a setting of dec-adapter"),
        ("dec-lora", 'lora.split="a"', 'lora.split = "a": a setting of decaf, and'),
        ("dec-lora", "adapter.width=4", "adapter.width = 4"),
        ("dec-adapter", "lora.rank=4", "lora.rank = 4"),
        ("dadam", "optimizer.bma=off", 'optimizer.bma = "off": a setting of deca'),
        ("qg-adam", "optimizer.discrepancy=none", "optimizer.discrepancy"),
        ("dsgd", "optimizer.adam_beta1=0.5", "optimizer.adam_beta1 = 0.5: a setting of dadam"),
        ("decaf", "schedule.layers_per_block=2", "schedule.layers_per_block = 2"),
        ("dsgd", "schedule.order=random", "schedule.order"),
        ("dadam", "quasi_global.first_moment=local", "quasi_global.first_moment"),
        ("dec-lora", "lora.local_steps=5", "schedule.steps = 48: not a multiple of lora.local_st"),
        ("decaf", "consensus.tolerance=0.1", "consensus.tolerance = 0.1: run.method is"),
        ("decaf", "aggregation.rule=clipped", 'aggregation.rule = "clipped": a setting of dadam'),
        ("deca", "aggregation.tau=2.0", 'aggregation.tau = 2.0: aggregation.rule is "mean"'),
    ],
)
def test_a_setting_of_another_method_is_refused_by_name(file, method, setting, words):
    """With who gave it, in one line."""
    with pytest.raises(ConfigError) as caught:
        load(file, [f"run.method={method}", setting])
    key = setting.partition("=")[0]
    giver = "" if words.startswith("schedule.steps") else "--set "
    assert str(caught.value).startswith(giver + words), caught.value
    assert "\n" not in str(caught.value)
    assert key in str(caught.value)


def test_an_unknown_method_is_refused_with_those_that_there_are(file):
    """As any other wrong value."""
    with pytest.raises(ConfigError, match=r"--set run\.method = \"fedavg\": .*'deca', 'dec-lora'"):
        load(file, ["run.method=fedavg"])


@pytest.mark.parametrize(
    "method", ["deca", "dec-lora", "decaf", "dec-adapter", "dsgd", "dadam", "qg-adam"]
)
def test_a_file_of_all_settings_can_be_read_again(file, tmp_path, method):
    """What has its default is nobody's fault."""
    settings = load(file, [f"run.method={method}"])
    again = tmp_path / "all.toml"
    again.write_text(template.document(settings))
    assert load(again).run == settings.run


def test_the_agreement_would_let_in_whom_the_mix_keeps_out(file):
    """It takes the mean, so it does not go with another rule."""
    with pytest.raises(
        ConfigError, match=r"consensus\.tolerance = 0\.1: the agreement takes the m"
    ):
        load(file, ["aggregation.rule=trimmed", "consensus.tolerance=0.1"])


def test_a_radius_goes_with_the_clipped_mix_alone(file):
    assert load(file, ["aggregation.rule=clipped", "aggregation.tau=2.0"]).aggregation.tau == 2.0
    with pytest.raises(ConfigError, match=r'aggregation\.tau = 2\.0: .*"trimmed"; remove it'):
        load(file, ["aggregation.rule=trimmed", "aggregation.tau=2.0"])


def test_all_nodes_mix_by_one_rule(file):
    """Fingerprints differ; the mean's is what it was before there was a choice."""

    def marks(*overrides):
        settings = load(file, overrides)
        return fingerprint(settings, schedule_for(settings, 4), "c", "w", "t", "fp32")

    assert not [name for name in marks() if name.startswith("aggregation")]
    clipped = marks("aggregation.rule=clipped")
    assert clipped["aggregation.rule"] == "clipped"
    assert clipped != marks("aggregation.rule=clipped", "aggregation.hostile=2")
    assert clipped != marks("aggregation.rule=trimmed")


def test_the_fingerprint_has_the_settings_of_the_method(file):
    """Nodes with another rank do not mix; DECA's fingerprint knows nothing of ranks."""

    def marks(*overrides):
        settings = load(file, overrides)
        return fingerprint(settings, schedule_for(settings, 4), "c", "w", "t", "fp32")

    assert marks("run.method=decaf", "lora.rank=4")["lora.rank"] == "4"
    assert "lora.split" in marks("run.method=decaf")
    assert "lora.split" not in marks("run.method=dec-lora")
    assert marks("run.method=dec-adapter")["adapter.width"] == "64"
    assert not [name for name in marks() if name.startswith(("lora", "adapter", "quasi"))]
    assert marks("run.method=dadam")["schedule.blocks"] == "1"
    assert marks()["schedule.blocks"] == "4"
