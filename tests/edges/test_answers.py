"""Answers for judges: FastChat's fields, gone on with where they ended, nothing overwritten."""

import json

import pytest
import torch

from deca_node.cli import main
from deca_node.config import ModelSettings
from deca_node.houlsby import Houlsby
from deca_node.models import LanguageModel
from tests.tiny import make_model

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Say a.", "Say b."]},
    {"question_id": 82, "category": "math", "turns": ["One and one?"]},
]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("answers") / "tiny", "llama", layers=2)


def ask(model, questions, to, *more):
    words = ["answer", "--model", model, "--questions", questions, "--to", to]
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in (*words, "--device", "cpu", "--max-tokens", 5, *more)])
    return ended.value.code


def test_answers_have_the_fields_that_a_judge_reads(model, tmp_path, capsys):
    """One choice each, as many turns as the question; the same model says the same again."""
    questions = write_lines(tmp_path / "questions.jsonl", QUESTIONS)
    to = tmp_path / "model_answer" / "tiny.jsonl"
    assert ask(model, questions, to) == 0
    assert "wrote 2 answers" in capsys.readouterr().out
    found = lines(to)
    assert [row["question_id"] for row in found] == [81, 82]
    for row, question in zip(found, QUESTIONS, strict=True):
        assert row.keys() == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert row["model_id"] == "tiny"
        (choice,) = row["choices"]
        assert choice["index"] == 0
        assert len(choice["turns"]) == len(question["turns"])
        assert all(isinstance(turn, str) for turn in choice["turns"])
    assert len({row["answer_id"] for row in found}) == 2
    again = tmp_path / "again.jsonl"
    assert ask(model, questions, again) == 0
    assert [row["choices"] for row in lines(again)] == [row["choices"] for row in found]


def test_what_is_answered_is_not_asked_again(model, tmp_path, capsys):
    """A call that was interrupted is gone on with; another model's answers are left alone."""
    few = write_lines(tmp_path / "few.jsonl", QUESTIONS[:1])
    both = write_lines(tmp_path / "both.jsonl", QUESTIONS)
    to = tmp_path / "answers.jsonl"
    assert ask(model, few, to) == 0
    first = to.read_text()
    to.write_text(first + '{"question_id": 82, "answ')  # as a crash leaves it
    assert ask(model, both, to) == 0
    assert to.read_text().startswith(first)
    assert [row["question_id"] for row in lines(to)] == [81, 82]
    content = to.read_bytes()
    assert ask(model, both, to, "--name", "other") == 8
    assert "answers of tiny, not of other" in capsys.readouterr().err
    assert to.read_bytes() == content


def test_answers_of_two_nodes_are_told_apart(tmp_path, capsys):
    """The folder of every node's model has one name, and a person may give two of them one, too."""
    questions = write_lines(tmp_path / "questions.jsonl", QUESTIONS)
    folders = [tmp_path / f"node-{number}" / "model" for number in range(2)]
    for seed, folder in enumerate(folders):
        make_model(folder, "llama", layers=1, seed=seed)
    to = tmp_path / "answers.jsonl"
    assert ask(folders[0], questions, to) == 0
    assert {row["model_id"] for row in lines(to)} == {"node-0"}
    content = to.read_bytes() + b'{"question_id": 83, "answ'
    to.write_bytes(content)
    capsys.readouterr()
    assert ask(folders[1], questions, to) == 8
    assert "holds answers of node-0, not of node-1" in capsys.readouterr().err
    assert ask(folders[1], questions, to, "--name", "node-0") == 8
    error = capsys.readouterr().err
    assert f"{to}: holds answers of another model than {folders[1]}" in error
    assert error.count("\n") == 1
    assert to.read_bytes() == content
    assert ask(folders[0], questions, to) == 0
    assert [row["question_id"] for row in lines(to)] == [81, 82]


def test_answers_of_before_they_told_the_model_are_left_alone(model, tmp_path, capsys):
    """Whose they are cannot be known."""
    questions = write_lines(tmp_path / "questions.jsonl", QUESTIONS)
    to = tmp_path / "answers.jsonl"
    assert ask(model, questions, to) == 0
    write_lines(to, [{**row, "answer_id": "3f2504e04f8941d39a0c0305e82c3301"} for row in lines(to)])
    content = to.read_bytes()
    assert ask(model, questions, to) == 8
    assert "from an earlier version" in capsys.readouterr().err
    assert to.read_bytes() == content


def test_bottlenecks_beside_a_model_are_put_to_use(model, tmp_path):
    """The folder of a dec-adapter run answers as the trained model, not as the base."""
    base = LanguageModel.load(ModelSettings(path=model), torch.device("cpu"))
    base.extend(added := Houlsby(base.module, base.stack, 4, seed=0))
    for layer in range(2):
        for parameter in added.parameters(layer).values():
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator()))
    base.export(tmp_path / "adapted")
    questions = write_lines(tmp_path / "questions.jsonl", QUESTIONS)
    said = []
    for folder in (model, tmp_path / "adapted"):
        to = tmp_path / f"{folder.name}.jsonl"
        assert ask(folder, questions, to, "--max-tokens", 12) == 0
        said.append([row["choices"] for row in lines(to)])
    assert said[0] != said[1]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"turns": ["a"]}], "question 1: question_id must be a number or a string"),
        ([{"question_id": 1, "turns": []}], "question 1: turns must be a list"),
        ([{"question_id": 1, "turns": "a"}], "question 1: turns must be a list"),
        ([{"question_id": 1, "turns": ["a"]}] * 2, "question 2: question_id 1 occurs twice"),
    ],
)
def test_a_question_that_is_none_is_named(model, tmp_path, capsys, rows, words):
    """Exit code 4, and no file of answers."""
    questions = write_lines(tmp_path / "questions.jsonl", rows)
    assert ask(model, questions, tmp_path / "answers.jsonl") == 4
    assert words in capsys.readouterr().err
    assert not (tmp_path / "answers.jsonl").exists()


def test_a_file_of_something_else_is_left_alone(model, tmp_path, capsys):
    """Exit code 8."""
    questions = write_lines(tmp_path / "questions.jsonl", QUESTIONS)
    to = write_lines(tmp_path / "notes.jsonl", [{"text": "a"}])
    assert ask(model, questions, to) == 8
    assert "does not hold answers" in capsys.readouterr().err
    assert lines(to) == [{"text": "a"}]
    to.write_text("dear")
    assert ask(model, questions, to) == 8
    assert to.read_text() == "dear"


def test_an_answer_ends_with_the_positions_of_the_model(tmp_path, capsys):
    """GPT-2 has a table of them; a question that takes all is named, and what was answered kept."""
    small = make_model(tmp_path / "small", "gpt2", layers=1, n_positions=48)
    turns = [["Say a."], ["Say a. " * 30]]
    rows = [{"question_id": number, "turns": each} for number, each in enumerate(turns)]
    questions, to = write_lines(tmp_path / "questions.jsonl", rows), tmp_path / "answers.jsonl"
    assert ask(small, questions, to, "--max-tokens", 500) == 4
    said = capsys.readouterr().err
    assert "questions.jsonl, question_id 1: the conversation has" in said
    assert "small can take 48 with the answer; shorten it" in said
    assert [row["question_id"] for row in lines(to)] == [0]


def test_a_model_without_a_chat_template_is_refused(tmp_path, capsys):
    """Exit code 5, with the remedy."""
    plain = make_model(tmp_path / "plain", "llama", layers=1)
    (plain / "chat_template.jinja").unlink()
    questions = write_lines(tmp_path / "questions.jsonl", QUESTIONS)
    assert ask(plain, questions, tmp_path / "answers.jsonl") == 5
    assert "has no chat template" in capsys.readouterr().err
