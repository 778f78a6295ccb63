"""What a report makes of rows: labels that tell lines apart, numbers of the table, curves."""

import json
import math
import re
import shlex
import statistics

import pytest

from deca_node.errors import ConfigError, OutputError
from deca_node.metrics import Band
from deca_node.report import Group, baseline, markdown, paired, panels, points, table, write


def names(*values):
    groups = [Group(each, []) for each in values]
    return {title: list(lines) for title, lines in panels(groups).items()}


def test_what_goes_with_the_method_is_not_said_again():
    """Each method has steps and settings of its own; the rate is what is compared."""
    deca = {"run.method": "deca", "schedule.steps": 4, "schedule.order": "descending"}
    lora = {"run.method": "dec-lora", "schedule.steps": 20, "lora.local_steps": 4}
    rate = "optimizer.learning_rate"
    shown = names({**deca, rate: 1e-3}, {**deca, rate: 3e-3}, {**lora, rate: 1e-3})
    assert shown == {
        "": [
            "learning_rate 0.001, method deca",
            "learning_rate 0.003, method deca",
            "learning_rate 0.001, method dec-lora",
        ]
    }


def test_one_rate_a_method_is_no_news():
    """The method's name is the last thing to go, even where the rates differ too."""
    rate = "optimizer.learning_rate"
    shown = names({"run.method": "deca", rate: 1e-3}, {"run.method": "dadam", rate: 3e-3})
    assert shown == {"": ["method deca", "method dadam"]}


def cell(losses, summary=None, *, every=1, steps=4, seed=0):
    """A cell of two nodes with the same losses; every so many steps an exchange."""
    rows = [
        {
            "kind": "step",
            "node": f"node-{node}",
            "visit": index // steps,
            "step": index % steps,
            "loss": loss,
            "disagreement": 2.0 if (index + 1) % every == 0 else 0.0,
            "neighbours": 1 if (index + 1) % every == 0 else 0,
        }
        for index, loss in enumerate(losses)
        for node in range(2)
    ]
    about = {"kind": "cell", "values": {}, "seed": seed, "settings": {"schedule": {"steps": steps}}}
    return [about, *rows, {"kind": "summary", **(summary or {})}]


def test_a_curve_is_the_mean_over_nodes_and_seeds():
    """With the sample deviation over seeds, by steps counted from 1."""
    group = Group({}, [cell([4.0, 3.0]), cell([2.0, 2.0])])
    curve = points(group, "loss")
    assert curve.steps == [1, 2]
    assert curve.mean == [3.0, 2.5]
    assert curve.spread == pytest.approx([statistics.stdev([4, 2]), statistics.stdev([3, 2])])


def test_all_curves_of_a_group_have_the_same_steps():
    """A loss that has diverged leaves a gap, and shifts nothing."""
    group = Group({}, [cell([1.0] * 150 + [None] * 100)])
    loss, apart = points(group, "loss"), points(group, "disagreement")
    assert loss.steps == apart.steps
    assert len(loss.mean) == len(apart.mean) == 125
    assert not any(map(math.isnan, loss.mean[:75]))
    assert all(map(math.isnan, loss.mean[75:]))
    assert apart.mean == [2.0] * 125


def test_steps_without_an_exchange_have_no_disagreement():
    """Rather than one of 0, which a logarithmic axis cannot show."""
    curve = points(Group({}, [cell([1.0] * 8, every=4)]), "disagreement")
    assert [step for step, mean in zip(curve.steps, curve.mean, strict=True) if mean == 2.0] == [
        4,
        8,
    ]
    assert sum(map(math.isnan, curve.mean)) == 6


def changed(cell, node, values, key="loss"):
    """The cell with other values of one of its nodes."""
    values, steps = iter(values), [row for row in cell if row["kind"] == "step"]
    new = {id(row): next(values) for row in steps if row["node"] == node}
    return [{**row, key: new[id(row)]} if id(row) in new else row for row in cell]


@pytest.mark.parametrize("key", ["loss", "disagreement"])
def test_a_node_or_seed_that_diverges_leaves_a_gap(key):
    """Rather than the mean of the others, which would be better the more of them diverge."""
    whole, other = cell([1.0] * 4), cell([3.0] * 4, seed=1)
    curve = points(Group({}, [changed(whole, "node-1", [1.0, None, 1.0, None], key), other]), key)
    assert [math.isnan(value) for value in curve.mean] == [False, True, False, True]
    assert [math.isnan(value) for value in curve.spread] == [False, True, False, True]
    assert curve.broken == {2, 4}


def test_a_step_without_an_exchange_is_no_gap():
    """Some methods exchange now and then only; their lines go on."""
    curve = points(Group({}, [cell([1.0] * 8, every=4)]), "disagreement")
    assert curve.broken == set()


def test_a_point_of_many_steps_is_a_gap_where_one_of_them_is():
    """As it is of their mean."""
    curve = points(Group({}, [cell([1.0] * 250 + [None] + [1.0] * 149)]), "loss")
    assert [step for step, mean in zip(curve.steps, curve.mean, strict=True) if mean != 1.0] == [
        251.5
    ]


def test_a_point_is_in_the_middle_of_its_steps():
    """The last one of fewer, where they do not come out even."""
    steps = points(Group({}, [cell([1.0] * 401)]), "loss").steps
    assert (steps[:2], steps[-1]) == ([2, 5], 400.5)


def test_a_gap_is_drawn_as_one(tmp_path, monkeypatch):
    """While steps that merely have no value are drawn over."""
    from matplotlib.axes import Axes

    from deca_node.plots import draw_curves

    drawn, plot = [], Axes.plot

    def seen(axes, x, y, **style):
        drawn.append((list(x), list(map(str, y))))
        return plot(axes, x, y, **style)

    monkeypatch.setattr(Axes, "plot", seen)
    nan = math.nan
    curve = Band([1, 2, 3, 4], [2.0, nan, nan, 1.0], [0.0, nan, nan, 0.0], {3})
    for log in (True, False):
        draw_curves({"": {"all": curve}}, "loss", [tmp_path / "loss.svg"], log=log)
    assert drawn == [([1, 3, 4], ["2.0", "nan", "1.0"])] * 2


def test_steps_are_counted_in_whole_numbers(tmp_path):
    """A short run's axis is not marked at step 2.5."""
    from deca_node.plots import draw_curves

    curve = Band(list(range(1, 21)), [1.0] * 20, [0.0] * 20)
    picture = tmp_path / "loss.svg"
    draw_curves({"": {"all": curve}}, "loss", [picture], log=True)
    assert "<!-- 5 -->" in picture.read_text()
    assert "<!-- 2.5 -->" not in picture.read_text()


def test_hostile_nodes_are_no_part_of_curves():
    """As they are none of the table."""
    hostile = changed(cell([1.0, 2.0]), "node-1", [100.0, None])
    hostile[0] = {**hostile[0], "world": {"faults": {"attacks": {"node-1": -1.0}}}}
    curve = points(Group({}, [hostile]), "loss")
    assert (curve.mean, curve.broken) == ([1.0, 2.0], set())


def test_the_table_says_how_many_seeds_are_behind_a_number():
    """No deviation of one; columns without news are left out; equal last words are told apart."""
    values = {"partition.alpha": 1.0, "lora.alpha": 16}
    seeds = [
        {"test_perplexity": 4.0, "loss": 1.0, "diverged": 0, "incomplete_mixes": 0},
        {"test_perplexity": None, "loss": 3.0, "diverged": 1, "incomplete_mixes": 0},
    ]
    headings, [row] = table([Group(values, [cell([1.0], each) for each in seeds])])
    told = dict(zip(headings, row, strict=True))
    assert told == {
        "lora.alpha": "16",
        "partition.alpha": "1.0",
        "seeds": "2",
        "perplexity": "4 (1 of 2)",
        "training loss": "2.000 ± 1.414",
        "diverged nodes": "0.5 ± 0.707",
    }


def test_test_loss_is_a_column_where_there_is_a_test():
    """Accuracy alone hides how wrong a node is; without a test there is nothing to show."""
    headings, [row] = table([Group({}, [cell([1.0], {"test_loss": 1.637})])])
    assert dict(zip(headings, row, strict=True))["test loss"] == "1.637"
    headings, _ = table([Group({}, [cell([1.0], {"loss": 1.0})])])
    assert "test loss" not in headings


def test_bytes_are_told_in_millions():
    """As links.bandwidth is given."""
    headings, [row] = table([Group({}, [cell([1.0], {"bytes_sent": 2_500_000})])])
    assert dict(zip(headings, row, strict=True))["MB sent a node"] == "2.5"


def test_nodes_that_did_not_finish_are_told():
    """The scores are the survivors'."""
    done, less = {"nodes": 4, "finished": 4}, {"nodes": 4, "finished": 3}
    groups = [Group({"links.loss": n}, [cell([1.0], each)]) for n, each in enumerate((done, less))]
    headings, rows = table(groups)
    assert [dict(zip(headings, row, strict=True))["unfinished nodes"] for row in rows] == ["0", "1"]
    identity = {"grid": ["links.loss"]}
    assert "did not finish" in markdown(identity, groups)
    assert "unfinished" not in table(groups[:1])[0]
    assert "did not finish" not in markdown(identity, groups[:1])


def by_seed(values, **scores):
    """A group with a cell for each seed."""
    count = len(next(iter(scores.values())))
    return Group(
        values,
        [
            cell([1.0], {f"test_{k}": v[seed] for k, v in scores.items()}, seed=seed)
            for seed in range(count)
        ],
    )


def test_differences_are_taken_seed_by_seed():
    """Each seed has another test: what all rows share of it is no spread of a difference."""
    base = by_seed({"run.method": "deca"}, accuracy=[0.5, 0.8, 0.6], loss=[2.0, 1.0, 1.5])
    other = by_seed({"run.method": "dadam"}, accuracy=[0.6, 0.9, 0.7], loss=[2.1, 0.8, None])
    headings, [row] = paired([base, other], base)
    assert dict(zip(headings, row, strict=True)) == {
        "method": "dadam",
        "accuracy": "+0.100 ± 0.000",
        "accuracy: ahead": "3 of 3",
        "test loss": "-0.050 ± 0.212",
        "test loss: ahead": "1 of 2",
    }
    assert "Differences from method deca" in markdown({"grid": ["run.method"]}, [base, other])
    assert "Differences" not in markdown({"grid": ["run.method"]}, [base])


def test_what_rounding_makes_of_a_difference_is_not_ahead():
    """Sums of the same scores in another order."""
    base = by_seed({"run.method": "deca"}, perplexity=[1e6, 3.0, 5.0])
    values = [1e6 - 1e-7, 3.0 * (1 - 1e-15), 5.0 * (1 - 1e-6)]
    other = by_seed({"run.method": "dadam"}, perplexity=values)
    headings, [row] = paired([base, other], base)
    assert dict(zip(headings, row, strict=True))["perplexity: ahead"] == "1 of 3"
    same = by_seed({"run.method": "dadam"}, accuracy=[0.1 + 0.2])
    base = by_seed({"run.method": "deca"}, accuracy=[0.6 - 0.3])
    assert paired([base, same], base)[1] == [["dadam", "+0.000", "0 of 1"]]
    assert paired([base, same], same)[1] == [["deca", "+0.000", "0 of 1"]]


def test_rows_without_a_common_seed_have_no_difference():
    """Rather than one between two tests."""
    base = by_seed({"run.method": "deca"}, accuracy=[0.5])
    late = Group({"run.method": "dadam"}, [cell([1.0], {"test_accuracy": 0.9}, seed=7)])
    assert paired([base, late], base)[1] == [["dadam", "-", "-"]]


def test_the_baseline_is_the_row_of_defaults_or_the_one_asked_for():
    """Numbers are compared as numbers; what fits no row, or several, is refused."""
    rate = "optimizer.learning_rate"
    groups = [
        Group({"run.method": method, rate: each}, [])
        for method in ("dadam", "deca", "dsgd")
        for each in (1e-3, 1e-2)
    ]
    assert baseline(groups) is groups[2]
    assert baseline(groups, ["run.method=dsgd", f"{rate}=1e-2"]) is groups[5]
    for wrong in (["run.method=dsgd"], ["run.method=sgd"], ["method"], ["topology.kind=ring"]):
        with pytest.raises(ConfigError, match="--against"):
            baseline(groups, wrong)


def test_values_that_a_table_cannot_hold_are_written_so_that_it_can():
    """A line break ends its row, and a bar its cell."""
    templates = ["{text}\nlabel: ä", "{text} | label:", "{text} label:"]
    groups = [by_seed({"data.template": each}, accuracy=[0.5]) for each in templates]
    lines = markdown({"grid": ["data.template"]}, groups).splitlines()
    rows = [line for line in lines if line.startswith("| ") and "template" not in line]
    cells = [re.split(r"(?<!\\)\|", row.strip("|"))[0].strip() for row in rows]
    assert cells[:3] == ['"{text}\\nlabel: ä"', "{text} \\| label:", "{text} label:"]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 4 for row in rows[:3])
    assert list(panels(groups)[""]) == [
        f"template {told}" for told in ('"{text}\\nlabel: ä"', *templates[1:])
    ]


RATE = "optimizer.learning_rate"
PARTS = [
    Group({"run.method": "deca", RATE: 1e-2}, []),
    Group({"run.method": "deca", RATE: 1e-2, "optimizer.bma": "off"}, []),
    Group({"run.method": "dsgd", RATE: 1e-2}, []),
]


@pytest.mark.parametrize(
    ("given", "asked", "row"),
    [
        ({}, ["run.method=deca", "optimizer.bma=on"], 0),
        ({}, ["optimizer.bma=on"], 0),  # dsgd has no such setting
        ({}, ["optimizer.bma=off"], 1),
        ({"optimizer.bma": "trivial"}, ["optimizer.bma=trivial"], 0),
    ],
)
def test_a_row_is_named_by_what_it_leaves_at_the_files_value_or_the_default(given, asked, row):
    """Where its settings are a part of another row's there is nothing else to tell it by."""
    assert baseline(PARTS, asked, given) is PARTS[row]


@pytest.mark.parametrize(
    "groups",
    [
        PARTS,
        [
            Group({"data.template": each}, [])
            for each in ("{text} |", "{text}\nlabel: 'a'", '{text}\nlabel: "a"')
        ],
        [Group({"faults.attacks": each}, []) for each in ({}, {"node-0": -1.0})],
        [
            Group({"run.method": "deca"}, []),
            Group({"links.loss": 0.1}, []),
            Group({"run.method": "dsgd"}, []),
        ],
    ],
)
def test_the_example_of_an_error_names_one_row(groups):
    """As a shell takes it, in one line."""
    with pytest.raises(ConfigError) as caught:
        baseline(groups, ["run.method=none"])
    said = str(caught.value)
    assert "\n" not in said
    words = shlex.split(said.partition("as in ")[2])
    assert words[::2] == ["--against"] * len(words[::2])
    assert baseline(groups, words[1::2]) in groups


def test_a_value_that_a_row_gives_itself_goes_before_a_default():
    """The table shows it."""
    groups = [
        Group({"run.method": "deca"}, []),
        Group({"run.method": "deca", "optimizer.bma": "on", "optimizer.discrepancy": "none"}, []),
    ]
    assert baseline(groups, ["optimizer.bma=on"]) is groups[1]
    assert baseline(groups, ["optimizer.discrepancy=l2"]) is groups[0]


def results(folder, **identity):
    """A folder of results with one cell."""
    (folder / "cells").mkdir(parents=True)
    tree = {"identity": {"grid": [], **identity}}
    (folder / "experiment.json").write_text(json.dumps(tree))
    rows = cell([2.0, 1.0], {"loss": 1.0})
    (folder / "cells" / "seed0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_no_report_is_written_over_another_experiments(tmp_path):
    """Nor over one of which nobody knows whose it is; over its own it is, as often as one likes."""
    one = results(tmp_path / "one", **{"experiment.name": "one"})
    two = results(tmp_path / "two", **{"experiment.name": "two"})
    to, old = tmp_path / "report", tmp_path / "old"
    for _ in range(2):
        write(one, to)
        write(one)
    text = (to / "report.md").read_bytes()
    with pytest.raises(OutputError, match="another experiment"):
        write(two, to)
    assert (to / "report.md").read_bytes() == text
    old.mkdir()
    (old / "table.csv").write_text("mine")
    with pytest.raises(OutputError, match="belongs to is unknown"):
        write(one, old)
    assert [p.name for p in old.iterdir()] == ["table.csv"]
    with pytest.raises(OutputError, match="another experiment"):
        write(one, two)
    assert not (two / "report.md").exists()
