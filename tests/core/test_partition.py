"""Partitions: properties of the pure functions, then the files."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deca_node.config import DataSettings
from deca_node.errors import DataError, DiskFullError, OutputError
from deca_node.partition import balanced_holdout, dirichlet, table, without_twins, write_shards
from deca_node.rows import read_rows

LABELS = ["sport"] * 40 + ["tech"] * 40 + ["arts"] * 40


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.sampled_from("abcd"), min_size=6, max_size=60),
    nodes=st.integers(1, 3),
    concentration=st.floats(0.5, 100),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_row_goes_to_exactly_one_node(
    labels: list[str], nodes: int, concentration: float, seed: int
) -> None:
    """Nothing is lost or doubled, no node is empty, and the seed decides all."""
    shards = dirichlet(labels, nodes, concentration, seed)
    assert len(shards) == nodes
    assert sorted(row for shard in shards for row in shard) == list(range(len(labels)))
    assert all(shards)
    assert all(shard == sorted(shard) for shard in shards)
    assert shards == dirichlet(labels, nodes, concentration, seed)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(4, 12), min_size=1, max_size=4),
    per_label=st.integers(0, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_holdout_is_balanced(counts: list[int], per_label: int, seed: int) -> None:
    """The test rows hold each label equally often; train and test share no row."""
    labels = [str(label) for label, count in enumerate(counts) for _ in range(count)]
    train, test = balanced_holdout(labels, per_label, seed)
    assert sorted(train + test) == list(range(len(labels)))
    assert all(Counter(labels[row] for row in test)[label] == per_label for label in set(labels))
    assert (train, test) == balanced_holdout(labels, per_label, seed)


def test_concentration_sets_the_skew() -> None:
    """A high concentration deals every label evenly, a low one piles labels up."""
    even = table(LABELS, dirichlet(LABELS, 4, 1e6, seed=0))
    assert all(abs(count - 10) <= 1 for node in even for count in node.values())
    skewed = table(LABELS, dirichlet(LABELS, 4, 0.1, seed=0))
    assert max(count for node in skewed for count in node.values()) > 25


def test_seeds_differ() -> None:
    """Another seed gives another partition."""
    assert dirichlet(LABELS, 4, 1.0, seed=0) != dirichlet(LABELS, 4, 1.0, seed=1)


def test_table_shows_zeros() -> None:
    """A label that a node lacks is shown with a count of 0."""
    assert table(["a", "b", "a"], [[0, 2], [1]]) == [{"a": 2, "b": 0}, {"a": 0, "b": 1}]


def test_as_many_nodes_as_rows() -> None:
    """Redrawing finds the rare split that leaves nobody empty."""
    assert sorted(dirichlet(["a", "b", "c"], 3, 0.5, seed=3)) == [[0], [1], [2]]


@pytest.mark.parametrize(
    ("labels", "nodes", "concentration", "message"),
    [
        (["a"], 0, 1.0, "nodes = 0"),
        (["a"], 1, 0.0, "concentration = 0.0"),
        (["a"], 1, float("nan"), "concentration = nan"),
        (["a"], 1, float("inf"), "concentration = inf"),
        (["a", "b"], 3, 1.0, "2 rows cannot be dealt to 3 nodes: use fewer nodes"),
        (["a"] * 9, 2, 1e-9, "without a row: use fewer nodes, more rows or a concentration above"),
    ],
)
def test_impossible_partition_says_what_to_change(
    labels: list[str], nodes: int, concentration: float, message: str
) -> None:
    """Arguments out of range and hopeless draws end in a ValueError that names the remedy."""
    with pytest.raises(ValueError, match=message):
        dirichlet(labels, nodes, concentration, seed=0)


def test_holdout_leaves_something_to_train_on() -> None:
    """A label that the test set would swallow whole is named."""
    with pytest.raises(ValueError, match="label 'b' has 2 rows"):
        balanced_holdout(["a", "a", "a", "b", "b"], 2, seed=0)
    with pytest.raises(ValueError, match="test rows per label = -1"):
        balanced_holdout(["a"], -1, seed=0)


@settings(max_examples=60, deadline=None)
@given(
    questions=st.lists(st.sampled_from("abcdefgh"), min_size=8, max_size=40),
    seed=st.integers(0, 2**32 - 1),
)
def test_nobody_trains_on_what_is_tested(questions: list[str], seed: int) -> None:
    """Of a shard exactly the test rows' twins go; the others stay in their order."""
    train, test = balanced_holdout(["x"] * len(questions), 2, seed)
    shards = [train[::2], train[1::2]]
    held = {questions[row] for row in test}
    left = [[row for row in shard if questions[row] not in held] for shard in shards]
    if all(left):
        assert without_twins(shards, test, questions) == left
    else:
        with pytest.raises(ValueError, match=r"all rows of node [01] ask what a test row asks"):
            without_twins(shards, test, questions)


@pytest.mark.parametrize(
    ("given", "rows"),
    [
        (None, [{"text": "a", "label": "x"}, {"text": "a", "label": "y"}]),
        (
            {"template": "{title}:", "label_field": "topic"},
            [{"title": "a", "topic": "x", "id": 1}, {"title": "a", "topic": "y", "id": 2}],
        ),
        (
            {"task": "instruction"},
            [
                {"prompt": "a", "response": "b", "label": "x"},
                {"prompt": "a", "response": "c", "label": "x"},
                {
                    "messages": [
                        {"role": "user", "content": "a"},
                        {"role": "assistant", "content": "d"},
                    ],
                    "label": "x",
                },
            ],
        ),
        ({"task": "text"}, [{"text": "a", "label": "x"}, {"text": "a", "label": "y", "n": 1}]),
    ],
)
def test_twins_of_test_rows_are_in_no_shard(
    tmp_path: Path, given: dict[str, Any] | None, rows: list[dict[str, Any]]
) -> None:
    """Rows that ask the same, under any label and with any answer."""
    field = (given or {}).get("label_field", "label")
    others = [
        {**dict.fromkeys(("text", "title", "prompt", "response"), f"{label} {n}"), field: label}
        for n in range(3)
        for label in "xy"
    ]
    source = tmp_path / "all.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *others]))
    chosen = None if given is None else DataSettings(train=source, **given)
    for seed in range(20):  # until one of the twins is held out and another is not
        path = tmp_path / str(seed)
        write_shards(
            source, path, 1, 1.0, seed, label_field=field, test_per_label=1, settings=chosen
        )
        test, shard = (read_rows(path / name) for name in ("test.jsonl", "node-0.jsonl"))
        held = [row for row in test if row in rows]
        assert not held or not [row for row in shard if row in rows]
        if len(held) == 1:
            assert len(shard) == len(rows) + len(others) - len(test) - (len(rows) - 1)
            return
    raise AssertionError("no twin was held out")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "all.jsonl"
    rows = [{"text": f"né {n}", "label": label} for n, label in enumerate(LABELS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_shards_hold_the_source_rows(source: Path, tmp_path: Path) -> None:
    """The files together are the source, the table counts them, and a second run agrees."""
    out = tmp_path / "made" / "shards"
    counts = write_shards(source, out, 3, 1.0, 7, label_field="label", test_per_label=5)
    assert sorted(path.name for path in out.iterdir()) == [
        "node-0.jsonl",
        "node-1.jsonl",
        "node-2.jsonl",
        "test.jsonl",
    ]
    shards = [read_rows(out / f"node-{node}.jsonl") for node in range(3)]
    test = read_rows(out / "test.jsonl")
    everything = [row["text"] for rows in (*shards, test) for row in rows]
    assert sorted(everything) == sorted(row["text"] for row in read_rows(source))
    assert Counter(row["label"] for row in test) == {"arts": 5, "sport": 5, "tech": 5}
    for rows, count in zip(shards, counts, strict=True):
        assert Counter(row["label"] for row in rows) == Counter(count)

    again = tmp_path / "again"
    write_shards(source, again, 3, 1.0, 7, label_field="label", test_per_label=5)
    for path in out.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()


def test_no_test_file_unless_asked(source: Path, tmp_path: Path) -> None:
    """Without a holdout all rows are dealt out."""
    counts = write_shards(source, tmp_path / "out", 2, 1.0, 0, label_field="label")
    assert not (tmp_path / "out" / "test.jsonl").exists()
    assert sum(sum(count.values()) for count in counts) == len(LABELS)


@pytest.mark.parametrize("name", ["node-1.jsonl", "test.jsonl"])
def test_existing_files_are_never_touched(source: Path, tmp_path: Path, name: str) -> None:
    """One file in the way stops the split before anything is written."""
    (tmp_path / name).write_text("precious")
    with pytest.raises(OutputError, match=f"{name} already exists"):
        write_shards(source, tmp_path, 2, 1.0, 0, label_field="label", test_per_label=1)
    assert (tmp_path / name).read_text() == "precious"
    assert not (tmp_path / "node-0.jsonl").exists()


def test_output_folder_is_a_file(source: Path) -> None:
    """A folder that cannot be made is an OutputError that names it."""
    with pytest.raises(OutputError, match=r"all\.jsonl"):
        write_shards(source, source, 2, 1.0, 0, label_field="label")


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is a Linux device")
def test_full_disk_leaves_no_half_split(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the second file does not fit, the first is taken away again."""
    really_open = Path.open

    def fill_up(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.name == "node-1.jsonl":
            path.symlink_to("/dev/full")
            return really_open(path, "w", encoding="utf-8")
        return really_open(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", fill_up)
    out = tmp_path / "out"
    with pytest.raises(DiskFullError, match=r"node-1\.jsonl: no space left on the disk; free some"):
        write_shards(source, out, 3, 1.0, 0, label_field="label")
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("nodes", "named", "message"),
    [
        (
            2,
            {"label_field": "topic"},
            r"all\.jsonl, row 1: no field 'topic'; it has: 'text', 'label'",
        ),
        (500, {"label_field": "label"}, r"all\.jsonl: 120 rows cannot be dealt to 500 nodes"),
        (
            2,
            {"label_field": "label", "test_per_label": 40},
            r"all\.jsonl: label 'arts' has 40 rows",
        ),
    ],
)
def test_unfit_data_is_a_data_error(
    source: Path, tmp_path: Path, nodes: int, named: dict[str, Any], message: str
) -> None:
    """What the data cannot give is said with the file's name."""
    with pytest.raises(DataError, match=message):
        write_shards(source, tmp_path, nodes, 1.0, 0, **named)
