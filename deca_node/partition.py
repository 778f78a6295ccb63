"""Deal one labelled data set out to nodes: unevenly, as private data is, and repeatably."""

import json
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from deca_node.config import DataSettings
from deca_node.data import label_of, questions, text_of
from deca_node.disk import make_folder, translated
from deca_node.errors import DataError, OutputError
from deca_node.rows import place, read_rows

MAX_DRAWS = 1000


def dirichlet(
    labels: Sequence[str], nodes: int, concentration: float, seed: int
) -> list[list[int]]:
    """Deal rows to nodes with a label mix of their own.

    For each label, the nodes' shares are one draw from a symmetric Dirichlet distribution. A
    concentration of 100 gives nodes nearly equal mixes, 0.1 leaves most nodes with few labels.
    Shares are drawn anew until every node has a row.

    Args:
        labels: each row's label.
        nodes: how many nodes, at least 1.
        concentration: the distribution's parameter, above 0.
        seed: same seed, same answer; at least 0.

    Returns:
        Per node, its row indices in ascending order; every row is in exactly one node's list.

    Raises:
        ValueError: an argument is out of range, or no draw gave every node a row.
    """
    if nodes < 1:
        raise ValueError(f"nodes = {nodes}: at least 1 is needed")
    if not 0 < concentration < float("inf"):
        raise ValueError(f"concentration = {concentration}: a finite number above 0 is needed")
    if len(labels) < nodes:
        raise ValueError(f"{len(labels)} rows cannot be dealt to {nodes} nodes: use fewer nodes")
    rng = np.random.default_rng(seed)
    piles = _shuffled_by_label(labels, rng)
    sizes = np.array([len(pile) for pile in piles])
    for _ in range(MAX_DRAWS):
        shares = rng.dirichlet(np.full(nodes, concentration), size=len(piles))
        # (labels, nodes): the row of its pile at which a node's part ends.
        ends = np.rint(shares.cumsum(axis=1) * sizes[:, None]).astype(np.int64)
        ends[:, -1] = sizes  # whatever rounding made of the shares' sum
        parts = np.diff(ends, axis=1, prepend=0)
        if parts.sum(axis=0).all():
            dealt = [np.split(pile, end[:-1]) for pile, end in zip(piles, ends, strict=True)]
            return [sorted(np.concatenate(own).tolist()) for own in zip(*dealt, strict=True)]
    raise ValueError(
        f"{MAX_DRAWS} draws left some of {nodes} nodes without a row: use fewer nodes, more rows"
        f" or a concentration above {concentration}"
    )


def balanced_holdout(
    labels: Sequence[str], per_label: int, seed: int
) -> tuple[list[int], list[int]]:
    """Set the same number of rows of each label aside.

    Returns:
        (row indices to train on, row indices to test on), each in ascending order.

    Raises:
        ValueError: ``per_label`` is negative, or would leave a label without a row to train on.
    """
    if per_label < 0:
        raise ValueError(f"test rows per label = {per_label}: at least 0 is needed")
    if per_label == 0:
        return list(range(len(labels))), []
    for label, count in sorted(Counter(labels).items()):
        if count <= per_label:
            raise ValueError(
                f"label {label!r} has {count} rows; testing on {per_label} of each label leaves"
                " none to train on"
            )
    piles = _shuffled_by_label(labels, np.random.default_rng(seed))
    test = sorted(int(row) for pile in piles for row in pile[:per_label])
    held = set(test)
    return [row for row in range(len(labels)) if row not in held], test


def without_twins(
    shards: Sequence[Sequence[int]], test: Sequence[int], questions: Sequence[Hashable]
) -> list[list[int]]:
    """The shards without rows that ask what a test row asks.

    Real corpora hold articles twice; a model that trained on a test row's twin is not tested by it.
    All other rows stay where they were dealt.

    Args:
        shards: row indices of each node.
        test: row indices to test on.
        questions: of each row, what it asks (``data.question`` or, where there is a tokenizer,
            ``data.asked``).

    Raises:
        ValueError: a shard would be left empty.
    """
    held = {questions[row] for row in test}
    kept = [[row for row in shard if questions[row] not in held] for shard in shards]
    if [] in kept:
        raise ValueError(
            f"all rows of node {kept.index([])} ask what a test row asks; take duplicates out of"
            " the data, or choose another seed"
        )
    return kept


def deal(
    labels: Sequence[str],
    nodes: int,
    concentration: float,
    seed: int,
    test_per_label: int,
    asked: Callable[[], Sequence[Hashable]],
) -> tuple[list[list[int]], list[int]]:
    """Set test rows aside and deal the others out, but for the test rows' twins.

    Args:
        labels: of each row.
        nodes: how many shards.
        concentration: of the Dirichlet distribution.
        seed: decides all.
        test_per_label: rows of each label to test on.
        asked: gives what each row asks; called where there is a test.

    Returns:
        (row indices of each node, row indices to test on).

    Raises:
        ValueError: as of the three functions that this combines.
    """
    train, test = balanced_holdout(labels, test_per_label, seed)
    dealt = dirichlet([labels[row] for row in train], nodes, concentration, seed)
    shards = [[train[index] for index in shard] for shard in dealt]
    return (without_twins(shards, test, asked()) if test else shards), test


def _shuffled_by_label(
    labels: Sequence[str], rng: np.random.Generator
) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    rows: dict[str, list[int]] = {label: [] for label in sorted(set(labels))}
    for index, label in enumerate(labels):
        rows[label].append(index)
    return [rng.permutation(np.array(pile, dtype=np.int64)) for pile in rows.values()]


def table(labels: Sequence[str], shards: Sequence[Sequence[int]]) -> list[dict[str, int]]:
    """Per node, label -> number of rows; every label of the whole is there, zeros included."""
    known = sorted(set(labels))
    counts = (Counter(labels[row] for row in shard) for shard in shards)
    return [{label: count[label] for label in known} for count in counts]


def write_shards(
    source: Path,
    out: Path,
    nodes: int,
    concentration: float,
    seed: int,
    *,
    label_field: str,
    test_per_label: int = 0,
    settings: DataSettings | None = None,
) -> list[dict[str, int]]:
    """Split a data set into ``out/node-0.jsonl`` and so on, and ``out/test.jsonl`` if asked to.

    All files are written or none; what is there already is never overwritten. No node gets a twin
    of a test row: equal in what ``settings`` make of it, or without them in all but the label.

    Returns:
        Per node, label -> number of rows it trains on.

    Raises:
        DataError: the data set cannot be read, or not be split like this.
        OutputError: one of the files is there already, or cannot be written.
        DiskFullError: the disk has no room.
    """
    rows = read_rows(source)
    places = [place(source, index) for index in range(len(rows))]
    if settings is not None and settings.task == "classification":
        labels = [
            label_of(row, label_field, settings.labels, at)
            for row, at in zip(rows, places, strict=True)
        ]
    else:
        labels = [text_of(row, label_field, at) for row, at in zip(rows, places, strict=True)]

    def asked() -> list[str]:
        if settings is not None:
            return questions(rows, settings, source)
        return [_all_but(row, label_field) for row in rows]

    try:
        shards, test = deal(labels, nodes, concentration, seed, test_per_label, asked)
    except ValueError as error:
        raise DataError(f"{source}: {error}") from None

    parts = {f"node-{node}.jsonl": own for node, own in enumerate(shards)}
    if test:
        parts["test.jsonl"] = test
    _write_all(
        {
            out / name: "".join(_json_line(rows[index], place(source, index)) for index in indices)
            for name, indices in parts.items()
        }
    )
    return table(labels, shards)


def _all_but(row: Mapping[str, Any], field: str) -> str:
    rest = {name: value for name, value in row.items() if name != field}
    return json.dumps(rest, sort_keys=True, default=str)


def _json_line(row: dict[str, Any], where: str) -> str:
    try:
        return json.dumps(row, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: cannot be written as JSON: {error}") from None


def _write_all(files: Mapping[Path, str]) -> None:
    for path in files:
        with translated(path):
            if path.exists():
                raise OutputError(f"{path} already exists; choose another folder or move it away")
    with ExitStack() as undo:  # so that no interrupted split passes for a whole one
        for path, content in files.items():
            with translated(path):
                make_folder(path.parent)
                with path.open("x", encoding="utf-8", newline="\n") as file:
                    undo.callback(path.unlink)
                    file.write(content)
        undo.pop_all()
