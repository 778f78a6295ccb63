"""Examples, on a tokenizer of one token a byte."""

import datetime as dt
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from deca_node.batches import Example
from deca_node.config import DataSettings
from deca_node.corpus import read_corpus
from deca_node.data import asked, examples, label_counts, label_token_ids, label_words
from deca_node.errors import ConfigError, DataError
from deca_node.rows import read_rows

SOURCE = Path("shard.jsonl")
BOS, EOS, PAD = 256, 257, 258


class ByteTokenizer:
    """One token a UTF-8 byte."""

    def __init__(
        self, prefix: Sequence[int] = (BOS,), eos_id: int | None = EOS, *, tells: bool = True
    ) -> None:
        self.prefix = prefix
        self.tells = tells  # where in a text a token begins
        self.eos_id = eos_id
        self.pad_id = PAD

    def encode(self, text: str) -> list[int]:
        """Bytes are ids."""
        return list(text.encode())

    def starts(self, text: str) -> tuple[list[int], list[int] | None]:
        """Each byte begins where its character is."""
        if not self.tells:
            return self.encode(text), None
        return self.encode(text), [i for i, char in enumerate(text) for _ in char.encode()]

    def in_place(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """No byte depends on another."""
        return map(self.encode, texts)

    def chat(self, messages: list[dict[str, str]], limit: int) -> list[tuple[list[int], bool]]:
        """``<u>hi`` EOS ``<a>ho`` EOS, of which ``ho`` EOS is learned."""
        segments = []
        for message in messages:
            if message["role"] not in ("system", "user", "assistant"):
                raise ValueError(f"unknown role {message['role']}")
            segments.append((self.encode(f"<{message['role'][0]}>"), False))
            segments.append(
                ([*self.encode(message["content"]), EOS], message["role"] == "assistant")
            )
        return segments


TOKENIZER = ByteTokenizer()


def data_settings(**changes: Any) -> DataSettings:
    given: dict[str, Any] = {"train": SOURCE, "max_tokens": 64, **changes}
    return DataSettings(**given)


def decode(ids: list[int]) -> str:
    """Strict: a character cut in half raises."""
    return bytes(token for token in ids if token < 256).decode()


def prompt_of(example: Example) -> str:
    pairs = zip(example.input_ids, example.completion, strict=True)
    return decode([token for token, trained in pairs if not trained])


def completion_of(example: Example) -> str:
    pairs = zip(example.input_ids, example.completion, strict=True)
    return decode([token for token, trained in pairs if trained])


def test_binary_columns_are_utf8_text(tmp_path: Path) -> None:
    """As some writers store text; bytes that are no text only matter when they are used."""
    import datasets

    rows = [{"text": "hé".encode(), "tags": [b"t"], "raw": b"\xff", "label": b"x"}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "a.parquet", tmp_path / "saved"):
        read = read_rows(path)
        assert read == [{"text": "hé", "tags": ["t"], "raw": b"\xff", "label": "x"}]
        [example] = examples(read, data_settings(template="{text} {tags[0]}:"), TOKENIZER, path)
        assert prompt_of(example) == "hé t:"
        for changes in ({"template": "{raw}:"}, {"label_field": "raw"}):
            with pytest.raises(DataError, match="row 1: field 'raw' is binary and not UTF-8 text"):
                examples(read, data_settings(**changes), TOKENIZER, path)


def test_class_labels_are_read_by_name(tmp_path: Path) -> None:
    """Both forms of a data set keep them; no label at all is a null."""
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    saved = datasets.Dataset.from_dict(
        {"text": ["a", "b", "c", "d"], "label": [0, 1, -1, None]}, features=features
    )
    saved.to_parquet(tmp_path / "a.parquet")
    saved.save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "a.parquet", tmp_path / "saved"):
        rows = read_rows(path)
        assert [row["label"] for row in rows] == ["neg", "pos", None, None]
        assert label_counts(examples(rows[:2], data_settings(), TOKENIZER, path)) == {
            "neg": 1,
            "pos": 1,
        }
        with pytest.raises(DataError, match=r"row 3: field 'label' is null"):
            examples(rows, data_settings(), TOKENIZER, path)


# Classification


def test_classification_example() -> None:
    """The prompt is the filled template after BOS; the completion is a space and the word."""
    settings = data_settings(template="{text}\nTopic:", labels={"0": "sport", "1": "tech"})
    [example] = examples([{"text": " a  b ", "label": 1}], settings, TOKENIZER, SOURCE)
    assert example.input_ids[0] == BOS
    assert prompt_of(example) == " a  b \nTopic:"
    assert completion_of(example) == " tech"
    assert example.label == "1"


def test_template_that_ends_in_white_space_gets_no_second_space() -> None:
    """The completion then is the bare word."""
    settings = data_settings(template="{text}\nTopic:\n")
    [example] = examples([{"text": "a", "label": "x"}], settings, TOKENIZER, SOURCE)
    assert completion_of(example) == "x"


def test_tokenizer_without_bos() -> None:
    """No BOS is made up."""
    tokenizer = ByteTokenizer(prefix=())
    [example] = examples([{"text": "a", "label": "x"}], data_settings(), tokenizer, SOURCE)
    assert decode(example.input_ids) == "a\nLabel: x"
    assert example.input_ids[0] == ord("a")


def test_all_that_the_tokenizer_puts_before_a_text_is_kept() -> None:
    """As GLM-4's two tokens, which take of data.max_tokens like any others."""
    tokenizer = ByteTokenizer(prefix=[300, 301])
    row = {"text": "alpha beta gamma delta", "label": "x"}
    [labelled] = examples([row], data_settings(max_tokens=28), tokenizer, SOURCE)
    assert labelled.input_ids == [300, 301, *b"alpha beta gamma\nLabel: x"]
    assert len(labelled.input_ids) <= 28
    [text] = examples([row], data_settings(task="text"), tokenizer, SOURCE)
    assert text.input_ids == [300, 301, *b"alpha beta gamma delta", EOS]


def test_label_token_ids_are_those_of_the_examples() -> None:
    """Evaluation scores exactly the tokens that training taught."""
    rows = [{"text": "t", "label": label} for label in ("b", "a", "b")]
    settings = data_settings()
    made = examples(rows, settings, TOKENIZER, SOURCE)
    words = label_words(made, settings)
    assert words == {"a": "a", "b": "b"}
    assert label_counts(made) == {"a": 1, "b": 2}
    ids = label_token_ids(words, settings, TOKENIZER)
    for example in made:
        pairs = zip(example.input_ids, example.completion, strict=True)
        assert ids[str(example.label)] == [token for token, trained in pairs if trained]


@pytest.mark.parametrize("size", [29, 64])
def test_rows_ask_the_same_where_the_model_sees_no_difference(size: int) -> None:
    """What differs only behind the cut is equal in training; labels play no part."""
    texts = [
        "one two three four five",
        "one two three four six",
        "one two",
        "one two three four five",
    ]
    rows = [{"text": text, "label": "ab"[n % 2]} for n, text in enumerate(texts)]
    first, second, short, again = asked(rows, data_settings(max_tokens=size), TOKENIZER, SOURCE)
    assert first == again
    assert first != short
    assert (first == second) == (size == 29)


def test_a_chat_asks_all_that_is_not_the_answer() -> None:
    """Equal but for the answers are twins; who only begins alike, or teaches nothing, is none."""
    said = [["hi", "A"], ["hi", "B"], ["hi", "A", "and", "C"], ["hi"], ["hi"]]
    roles = ("user", "assistant") * 2
    rows = [
        {"messages": [{"role": r, "content": c} for r, c in zip(roles, each, strict=False)]}
        for each in said
    ]
    one, other, *rest = asked(rows, data_settings(task="instruction"), TOKENIZER, SOURCE)
    assert one == other
    assert len({one, *rest}) == 4


def test_configured_label_words_are_kept_whole() -> None:
    """A shard that lacks a label still knows its word."""
    settings = data_settings(labels={"1": "yes", "0": "no"})
    made = examples([{"text": "t", "label": 1}], settings, TOKENIZER, SOURCE)
    assert label_words(made, settings) == {"1": "yes", "0": "no"}


@pytest.mark.parametrize("given", [{"labels": {"a": "a", "b": "b"}}, {}])
def test_unknown_label_is_named_with_its_row(given: dict[str, Any]) -> None:
    """The row, its label and the known labels are in the message."""
    rows = [{"text": "t", "label": "a"}, {"text": "t", "label": "c"}]
    words = None if given else {"a": "a", "b": "b"}
    with pytest.raises(DataError, match=r"row 2: label 'c' is not one of: a, b; add it to data\.l"):
        examples(rows, data_settings(**given), TOKENIZER, SOURCE, words)


@pytest.mark.parametrize("blank", ["", " "])
def test_a_blank_label_is_named_by_its_row(blank: str) -> None:
    """As it is its own word, there would be nothing to learn; data.labels may have one for it."""
    rows = [{"text": "t", "label": "a"}, {"text": "t", "label": blank}]
    told = r"shard\.jsonl, row 2: data\.label_field 'label' is blank; give it a label or remove"
    with pytest.raises(DataError, match=told):
        examples(rows, data_settings(), TOKENIZER, SOURCE)
    with pytest.raises(DataError, match=told):  # a test's
        examples(rows, data_settings(), TOKENIZER, SOURCE, {"a": "a"})
    given = data_settings(labels={"a": "a", blank: "none"})
    assert label_counts(examples(rows, given, TOKENIZER, SOURCE)) == {blank: 1, "a": 1}


def test_labels_that_look_the_same_are_told() -> None:
    """They are trained as they are; that they are meant to differ is unlikely."""
    labels = ["north", " north", "south", "North", "east", "1", "1.0"]
    rows = [{"text": "t", "label": label} for label in labels]
    with capture_logs() as logs:
        made = examples(rows, data_settings(), TOKENIZER, SOURCE)
        examples(rows, data_settings(), TOKENIZER, SOURCE, label_words(made, data_settings()))
        examples(rows[2:3], data_settings(), TOKENIZER, SOURCE)
    assert [entry["labels"] for entry in logs] == [[[" north", "North", "north"]]]
    assert label_counts(made) == dict.fromkeys(sorted(labels), 1)


def test_rows_without_text_are_counted_once() -> None:
    """They are trained as they are: an empty field may mean something, if not all are."""
    settings = data_settings(template="{title}: {meta[text]}")
    parts = [("", " "), ("", "a"), ("a", ""), ("\n", ""), ("", 0)]
    rows = [{"title": title, "meta": {"text": text}, "label": "x"} for title, text in parts]
    with capture_logs() as logs:
        assert len(examples(rows, settings, TOKENIZER, SOURCE)) == 5
        examples(rows[1:3], settings, TOKENIZER, SOURCE)
    assert [(entry["rows"], entry["empty"], entry["source"]) for entry in logs] == [
        (5, 2, "shard.jsonl")
    ]


def test_labels_that_are_no_text_are_taken_as_written() -> None:
    """So that the same table says the same as CSV and as Parquet; booleans as JSON has them."""
    rows = [{"text": "t", "label": label} for label in (1, 1.0, True)]
    assert list(label_counts(examples(rows, data_settings(), TOKENIZER, SOURCE))) == [
        "1",
        "1.0",
        "true",
    ]


def test_booleans_are_the_same_labels_in_every_form(tmp_path: Path) -> None:
    """What CSV and JSON have as ``true`` is no other label in Parquet."""
    import datasets

    (tmp_path / "a.jsonl").write_text('{"text": "t", "label": true}\n{"text": "t", "label": false}')
    (tmp_path / "a.csv").write_text("text,label\nt,true\nt,false\n")
    datasets.Dataset.from_list(read_rows(tmp_path / "a.jsonl")).to_parquet(tmp_path / "a.parquet")
    settings = data_settings(labels={"true": "yes", "false": "no"})
    for path in tmp_path.iterdir():
        found = examples(read_rows(path), settings, TOKENIZER, path)
        assert [example.label for example in found] == ["true", "false"], path.name


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "t"}, "row 2: no field 'label'; it has: 'text'"),
        ({"label": "a"}, "row 2: no field 'text'; it has: 'label'"),
        ({"text": "t", " label": "a"}, "row 2: no field 'label'; it has: 'text', ' label'"),
        (
            {"text": None, "label": "a"},
            "row 2: field 'text' is null; give it a value",
        ),
        ({"text": "t", "label": None}, "row 2: field 'label' is null"),
        ({"text": "t", "label": ["a"]}, "row 2: field 'label' is a list, not text"),
        ({"text": "t", "label": math.nan}, "row 2: field 'label' is nan, not a finite number"),
        ({"text": -math.inf, "label": "a"}, "row 2: field 'text' is -inf, not a finite number"),
    ],
)
def test_unfit_row_is_named(row: dict[str, Any], message: str) -> None:
    """A field that is missing or no text is named with its row."""
    rows = [{"text": "t", "label": "a"}, row]
    with pytest.raises(DataError, match=re.escape(f"shard.jsonl, {message}")):
        examples(rows, data_settings(), TOKENIZER, SOURCE)


def test_long_text_is_cut_at_a_space() -> None:
    """What follows the text in the template and the completion stay whole."""
    settings = data_settings(template="{title}: {text}\nTopic:", max_tokens=38)
    row = {"title": "News", "text": "alpha beta  gamma delta epsilon zeta", "label": "x"}
    [example] = examples([row], settings, TOKENIZER, SOURCE)
    assert prompt_of(example) == "News: alpha beta  gamma\nTopic:"
    assert completion_of(example) == " x"


@pytest.mark.parametrize("template", ["{text:>40}|", "{text:<40}|", "{text!r}|", "{text:.30}|"])
def test_a_template_that_changes_the_text_loses_none_that_fits(template: str) -> None:
    """Where a token begins in it says nothing of the row then."""
    settings = data_settings(template=template, max_tokens=64)
    rows = [{"text": "alpha beta gamma " * 9, "label": "x"}]
    found = examples(rows, settings, TOKENIZER, SOURCE)
    assert found == examples(rows, settings, ByteTokenizer(tells=False), SOURCE)


def test_a_text_that_a_template_has_twice_is_cut_in_both_places() -> None:
    """Where it ends cannot be told from one tokenization then: it is tried."""
    settings = data_settings(template="{text}|{text}|", max_tokens=32)
    [example] = examples([{"text": "alpha beta gamma", "label": "x"}], settings, TOKENIZER, SOURCE)
    assert prompt_of(example) == "alpha beta|alpha beta|"


def test_text_without_spaces_is_cut_between_characters() -> None:
    """Characters of several tokens are never halved, and the room is used up."""
    settings = data_settings(max_tokens=32)
    [example] = examples([{"text": "語" * 99, "label": "x"}], settings, TOKENIZER, SOURCE)
    assert prompt_of(example) == "語" * 7 + "\nLabel:"
    assert 32 - 3 < len(example.input_ids) <= 32


@hypothesis_settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=200), other=st.text(max_size=5), limit=st.integers(48, 80))
def test_cut_rows_always_fit(text: str, other: str, limit: int) -> None:
    """Whatever the text, at most max_tokens remain and only its end is lost."""
    settings = data_settings(template="{other}|{text}|", max_tokens=limit)
    row = {"text": "." * 6 + text, "other": other, "label": "x"}
    [example] = examples([row], settings, TOKENIZER, SOURCE)
    # Here every byte counts for itself, so that where a tokenizer cannot tell comes to the same.
    assert examples([row], settings, ByteTokenizer(tells=False), SOURCE) == [example]
    assert len(example.input_ids) <= limit
    kept = prompt_of(example).removeprefix(other + "|").removesuffix("|")
    assert str(row["text"]).startswith(kept)
    assert len(kept) >= 3  # six fit at least, and going back to a space gives up no more than half


@pytest.mark.parametrize(
    ("template", "row"),
    [
        ("x" * 70 + "{text}", {"text": "t", "label": "a"}),
        ("{text}", {"text": "t", "label": "word" * 20}),
        ("{text}", {"text": 10**70, "label": "a"}),
    ],
)
def test_no_room_for_text(template: str, row: dict[str, Any]) -> None:
    """When cutting cannot help, the setting to raise is named."""
    with pytest.raises(DataError, match=r"row 1: .* no room for text in data\.max_tokens = 64"):
        examples([row], data_settings(template=template), TOKENIZER, SOURCE)


def test_template_may_format_fields() -> None:
    """Format specifications and indexing work as in Python."""
    settings = data_settings(template="{score:.1f} {tags[0]} {{x}}:")
    row = {"score": 0.25, "tags": ["t"], "label": "a"}
    [example] = examples([row], settings, TOKENIZER, SOURCE)
    assert prompt_of(example) == "0.2 t {x}:"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["a", "b"], "field 'text' is a list, not text; name a part of it, as in {text[0]}"),
        ({"a": "b"}, "field 'text' is a dict, not text; name a part of it, as in {text[a]}"),
        ([], "field 'text' is a list, not text"),
    ],
)
def test_template_takes_text_only(value: Any, message: str) -> None:
    """No model is trained on what Python shows of a list."""
    with pytest.raises(DataError, match=re.escape(f"row 1: {message}")):
        examples([{"text": value, "label": "a"}], data_settings(), TOKENIZER, SOURCE)


def test_part_of_a_field_is_text_too() -> None:
    """What an index leads to is looked at as a field is."""
    settings = data_settings(template="{text[0]}:")
    for inner, message in (([1], r"'text\[0\]' is a list"), (None, r"'text\[0\]' is null")):
        with pytest.raises(DataError, match=f"row 1: field {message}"):
            examples([{"text": [inner], "label": "a"}], settings, TOKENIZER, SOURCE)
    with pytest.raises(DataError, match=r"row 1: data\.template cannot be filled"):
        examples([{"text": [], "label": "a"}], settings, TOKENIZER, SOURCE)


def test_a_line_break_that_the_shell_did_not_make_is_told() -> None:
    """The model is trained on a backslash then, which may even be meant."""
    for template, told in ((r"{text}\nTeam:", True), ("{text}\nTeam:", False)):
        with capture_logs() as logs:
            rows = [{"text": "t", "label": "a"}]
            examples(rows, data_settings(template=template), TOKENIZER, SOURCE)
            examples(rows, data_settings(template=template), TOKENIZER, SOURCE, {"a": "a"})
        assert [entry["template"] for entry in logs] == [template] * told
        assert all("quote" in entry["event"] for entry in logs)


def test_template_writes_dates_as_they_are() -> None:
    """A Parquet file's dates have one obvious text, and a format of their own."""
    row = {"day": dt.date(2026, 3, 1), "label": "a"}
    [example] = examples([row], data_settings(template="{day} {day:%d.%m.}:"), TOKENIZER, SOURCE)
    assert prompt_of(example) == "2026-03-01 01.03.:"


def test_template_names_no_attributes() -> None:
    """They are Python's, not the row's."""
    for template in ("{text.__class__}", "{text[0].real}", "{meta.text}", "{text:{text.real}}"):
        with pytest.raises(ConfigError, match=r"data\.template = .*may not contain dots"):
            examples(
                [{"text": "t", "label": "a"}], data_settings(template=template), TOKENIZER, SOURCE
            )


def test_template_that_does_not_suit_the_row() -> None:
    """A format specification that the value refuses names the row."""
    with pytest.raises(DataError, match=r"row 1: data\.template cannot be filled"):
        examples(
            [{"text": "t", "label": "a"}], data_settings(template="{text:d}"), TOKENIZER, SOURCE
        )


def test_prompt_without_tokens() -> None:
    """Nothing would predict the completion's first token."""
    with pytest.raises(DataError, match="row 1: the prompt is empty"):
        examples(
            [{"text": "", "label": "a"}],
            data_settings(template="{text}"),
            ByteTokenizer(prefix=()),
            SOURCE,
        )


@pytest.mark.parametrize("template", ["{text", "{}", "{0}", "no field", ""])
def test_unusable_template(template: str) -> None:
    """A template that cannot be filled is a mistake in the configuration."""
    with pytest.raises(ConfigError, match=r"data\.template"):
        examples([{"text": "t", "label": "a"}], data_settings(template=template), TOKENIZER, SOURCE)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"a": " "}, "label 'a' has no word"),
        ({"a": "x", "b": "x"}, "cannot tell labels 'a' and 'b' apart"),
    ],
)
def test_unusable_label_words(words: dict[str, str], message: str) -> None:
    """Each label needs tokens of its own."""
    with pytest.raises(ConfigError, match=message):
        label_token_ids(words, data_settings(), TOKENIZER)


# Instruction


def test_prompt_and_response() -> None:
    """They become a user's and an assistant's message; only the latter is learned."""
    settings = data_settings(task="instruction")
    [example] = examples([{"prompt": "hi", "response": "ho"}], settings, TOKENIZER, SOURCE)
    assert prompt_of(example) == "<u>hi<a>"
    assert completion_of(example) == "ho"
    assert example.input_ids[-1] == EOS
    assert example.completion[-1]
    assert example.label is None


def test_messages_win_over_prompt_and_response() -> None:
    """All assistant turns are learned; null messages count as none."""
    settings = data_settings(task="instruction")
    turns = [("system", "s"), ("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4")]
    messages = [{"role": role, "content": content, "id": 7} for role, content in turns]
    rows: list[dict[str, Any]] = [
        {"messages": messages, "prompt": "p", "response": "r"},
        {"messages": None, "prompt": "p", "response": "r"},
    ]
    first, second = examples(rows, settings, TOKENIZER, SOURCE)
    assert prompt_of(first) == "<s>s<u>1<a><u>3<a>"
    assert completion_of(first) == "24"
    assert completion_of(second) == "r"


def test_long_conversations_are_cut_or_dropped_and_counted() -> None:
    """A row that keeps some of its answer stays; one that keeps none is dropped and logged."""
    settings = data_settings(task="instruction", max_tokens=16)
    rows = [
        {"prompt": "12345", "response": "long answer"},
        {"prompt": "12345678901234567890", "response": "lost"},
    ]
    with capture_logs() as logs:
        [example] = examples(rows, settings, TOKENIZER, SOURCE)
    assert len(example.input_ids) == 16
    assert completion_of(example) == "long"
    assert [(entry["rows"], entry["dropped"]) for entry in logs] == [(2, 1)]
    assert logs[0]["why"] == "in 1 nothing is learned within data.max_tokens = 16; raise it"


@pytest.mark.parametrize("blank", ["", " \n"])
def test_a_chat_whose_only_answer_is_blank_is_dropped(blank: str) -> None:
    """Though a template's mark of its end could be learned."""
    rows = [{"prompt": "a", "response": blank}, {"prompt": "a", "response": "b"}]
    with capture_logs() as logs:
        [example] = examples(rows, data_settings(task="instruction"), TOKENIZER, SOURCE)
    assert completion_of(example) == "b"
    assert [entry["why"] for entry in logs] == ["in 1 the answer is empty; fill it in"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "t"}, "neither field 'messages' nor field 'prompt'; it has: 'text'"),
        ({"prompt": "p"}, "no field 'response'; it has: 'prompt'"),
        ({"messages": "hi"}, "field 'messages' is not a list of {role, content} objects"),
        ({"messages": ["hi"]}, "field 'messages' is not a list of {role, content} objects"),
        ({"messages": [{"role": "user"}]}, "message 1 of 'messages': no field 'content'"),
        (
            {"messages": [{"role": "elf", "content": "c"}]},
            "the model's chat template refuses it: unknown role elf",
        ),
        ({"messages": []}, "field 'messages' has no messages; remove the row"),
    ],
)
def test_unfit_conversation_is_named(row: dict[str, Any], message: str) -> None:
    """The row and what it lacks are in the message."""
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        examples([row], data_settings(task="instruction"), TOKENIZER, SOURCE)
    assert str(caught.value).startswith("shard.jsonl, row 1: ")


class AnyRole(ByteTokenizer):
    """With a chat template that takes any role, as most do."""

    def in_place(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """No byte depends on another."""
        return map(self.encode, texts)

    def chat(self, messages: list[dict[str, str]], limit: int) -> list[tuple[list[int], bool]]:
        """Each message as it is."""
        return [(self.encode(each["content"]), each["role"] == "assistant") for each in messages]


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (
            ("human", "gpt"),
            "no message has the role 'assistant' (found: gpt, human); rename them to user and"
            " assistant",
        ),
        (
            ("user", "model", "assistant"),
            "message 2 of 'messages' has the role 'model', not one of: system, user, assistant,"
            " tool; rename it",
        ),
    ],
)
def test_unknown_roles_are_refused(roles: tuple[str, ...], message: str) -> None:
    """A template that takes them would have them trained as they are."""
    row = {"messages": [{"role": role, "content": role} for role in roles]}
    with pytest.raises(DataError, match=re.escape(f"shard.jsonl, row 1: {message}")):
        examples([row], data_settings(task="instruction"), AnyRole(), SOURCE)


def test_calls_of_tools_are_refused() -> None:
    """They would be lost, and the turn trained as an empty one; none at all are no obstacle."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    settings = data_settings(task="instruction")
    for content in ("", None):
        said = {"role": "assistant", "content": content, "tool_calls": [call]}
        row = {"messages": [{"role": "user", "content": "a"}, said]}
        with pytest.raises(
            DataError, match=r"row 1: message 2 of 'messages' has tool_calls, .* into its content"
        ):
            examples([row], settings, AnyRole(), SOURCE)
    for none in (None, []):  # as Parquet has them in messages without
        turns = [("user", "a"), ("assistant", "c")]
        row = {"messages": [{"role": r, "content": c, "tool_calls": none} for r, c in turns]}
        [example] = examples([row], settings, AnyRole(), SOURCE)
        assert completion_of(example) == "c"


def test_tool_messages_are_no_strangers() -> None:
    turns = [("user", "a"), ("tool", "b"), ("assistant", "c")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    [example] = examples([row], data_settings(task="instruction"), AnyRole(), SOURCE)
    assert completion_of(example) == "c"


# Text


def test_text_is_cut_into_pieces() -> None:
    """Pieces joined are BOS, the text, EOS; all of it is learned."""
    settings = data_settings(task="text", max_tokens=8)
    made = examples([{"text": "0123456789abc"}], settings, TOKENIZER, SOURCE)
    assert [len(example.input_ids) for example in made] == [8, 7]
    joined = [token for example in made for token in example.input_ids]
    assert joined == [BOS, *b"0123456789abc", EOS]
    assert all(all(example.completion) for example in made)


@pytest.mark.parametrize(("eos_id", "end"), [(EOS, [EOS]), (0, [0]), (None, [])])
def test_a_text_ends_with_the_tokenizers_end(eos_id: int | None, end: list[int]) -> None:
    """Which some have at 0, and some have not."""
    settings = data_settings(task="text", max_tokens=8)
    [made] = examples([{"text": "ab"}], settings, ByteTokenizer(eos_id=eos_id), SOURCE)
    assert made.input_ids == [BOS, *b"ab", *end]


def test_piece_of_one_token_is_dropped() -> None:
    """The ninth token alone has nothing to be predicted from."""
    settings = data_settings(task="text", max_tokens=8)
    made = examples([{"text": "0123456"}], settings, TOKENIZER, SOURCE)
    assert [len(example.input_ids) for example in made] == [8]


LOST = {"prompt": "much too long", "response": "lost"}
ASKED = {"messages": [{"role": "user", "content": "a"}]}


@pytest.mark.parametrize(
    ("task", "rows", "why"),
    [
        ("text", [{"text": ""}], "in 1 there is no text; see data.text_field"),
        ("instruction", [LOST], "in 1 nothing is learned within data.max_tokens = 8; raise it"),
        (
            "instruction",
            [ASKED, LOST, ASKED],
            "in 2 no message has the role 'assistant' (found: user); add answers;"
            " in 1 nothing is learned within data.max_tokens = 8; raise it",
        ),
        (
            "instruction",
            [{"messages": [{"role": "assistant", "content": ""}]}],
            "in 1 the answer is empty; fill it in",
        ),
        (
            "instruction",
            [{"messages": [{"role": "assistant", "content": "a"}]}],
            "in 1 nothing comes before the answer; begin with a message of the user",
        ),
    ],
)
def test_rows_without_an_example_are_an_empty_shard(
    task: str, rows: list[dict[str, Any]], why: str
) -> None:
    """A node with nothing to learn says so before the run, with a remedy for each reason."""
    settings = data_settings(task=task, max_tokens=8)
    message = f"shard.jsonl: empty shard: none of {len(rows)} rows yields an example: {why}"
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        examples(rows, settings, AnyRole((), None), SOURCE)


@pytest.mark.parametrize(
    ("task", "rows", "held"),
    [
        ("classification", [{"text": "a", "label": "x"}], {"text": "a", "label": "x", "id": 1}),
        ("instruction", [{"prompt": "a", "response": "b"}], {"prompt": "a", "response": "c"}),
        ("text", [{"text": "a b"}], {"text": "a b"}),
    ],
)
def test_what_is_trained_on_is_no_test(
    tmp_path: Path, task: str, rows: list[dict[str, Any]], held: dict[str, Any]
) -> None:
    """Test rows that ask the same as a row to train on are counted and told, with the remedy."""
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    module = SimpleNamespace(
        config=SimpleNamespace(get_text_config=SimpleNamespace),
        get_input_embeddings=lambda: torch.nn.Embedding(PAD + 1, 1),
        named_modules=list,
        named_buffers=list,
    )
    model = SimpleNamespace(tokenizer=TOKENIZER, module=module)
    other = {name: f"{value}!" if name != "label" else value for name, value in held.items()}
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for found, twins in (([held, other, held], 2), ([other], 0)):
        test.write_text("".join(json.dumps(row) + "\n" for row in found))
        corpus = read_corpus(data_settings(task=task, train=train, test=test), TOKENIZER)
        assert len(corpus.test) == len(found)
        assert corpus.twins == twins
        warnings = corpus.warnings(model, tmp_path)
        assert [each.partition(" ask ")[0] for each in warnings] == ["2 rows of data.test"][:twins]
