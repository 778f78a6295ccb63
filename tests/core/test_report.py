"""What a report makes of rows: labels that tell lines apart, numbers of the table, curves."""

import math
import statistics

import pytest

from deca_node.report import Group, panels, points, table


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


def cell(losses, summary=None, *, every=1, steps=4):
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
    about = {"kind": "cell", "values": {}, "seed": 0, "settings": {"schedule": {"steps": steps}}}
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
