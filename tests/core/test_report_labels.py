"""Labels of a report's lines: what tells them apart, and no more."""

from deca_node.report import Group, panels


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
