"""Rows of files of all kinds, and of broken ones."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deca_node.errors import DataError
from deca_node.rows import read_rows

ROWS = [{"text": "a, \u2028 b", "label": "x"}, {"text": 'line\none "q"', "label": "é"}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "A.JSONL"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    """Blank lines, a byte order mark and Windows line ends do not matter."""
    lines = "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\r\n\n"
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert read_rows(tmp_path / name) == ROWS


def test_csv(tmp_path: Path) -> None:
    """Quotes, line ends within quotes and blank lines are read as RFC 4180 has them."""
    content = 'text,label\r\n"a, \u2028 b",x\r\n\r\n"line\none ""q""",é\r\n'
    (tmp_path / "a.csv").write_bytes(content.encode())
    assert read_rows(tmp_path / "a.csv") == ROWS


def test_csv_values_stay_as_written(tmp_path: Path) -> None:
    """Nothing is guessed: a code keeps its zero, NA is a word, long articles are welcome."""
    article = "x" * 200_000
    (tmp_path / "a.csv").write_text(f"text,label\n{article},007\nb,NA\n")
    assert read_rows(tmp_path / "a.csv") == [
        {"text": article, "label": "007"},
        {"text": "b", "label": "NA"},
    ]


@pytest.fixture(scope="module")
def columnar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ROWS as Parquet, as a saved Dataset and as a saved DatasetDict."""
    import datasets

    datasets.disable_progress_bars()
    folder = tmp_path_factory.mktemp("columnar")
    saved = datasets.Dataset.from_list(ROWS)
    saved.to_parquet(folder / "a [1]*.parquet")
    saved.save_to_disk(folder / "saved")
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(folder / "splits")
    return folder


def test_parquet_and_saved_folder(columnar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both give the rows, leave the folder as it was and open no connection."""

    def refuse(*args: Any) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    before = sorted(columnar.rglob("*"))
    assert read_rows(columnar / "a [1]*.parquet") == ROWS
    assert read_rows(columnar / "saved") == ROWS
    assert sorted(columnar.rglob("*")) == before


def test_parquet_needs_no_home(columnar: Path) -> None:
    """A daemon whose home folder cannot be written reads Parquet in silence."""
    code = "import sys, pathlib, deca_node.rows as r; r.read_rows(pathlib.Path(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(columnar / "a [1]*.parquet")],
        env={"HOME": "/proc/nothing", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_data_set_dict_names_its_splits(columnar: Path) -> None:
    """A split's folder can be read, and the message says which there are."""
    with pytest.raises(DataError, match="splits: a DatasetDict with the splits test, train;"):
        read_rows(columnar / "splits")
    assert read_rows(columnar / "splits" / "test") == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n\n{"a": \n', "a.jsonl, line 3: not valid JSON (Expecting value)"),
        ("a.jsonl", b"[\n1]", "a.jsonl, line 1: not valid JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "a.jsonl, line 2: a JSON array; each line must be one"),
        ("a.jsonl", b"null", "a.jsonl, line 1: a JSON null"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1: not valid JSON"),
        (
            "a.jsonl",
            b'{"a": 1}\n{"a": "\xff"}',
            "a.jsonl, line 2: not UTF-8 text (invalid start byte); save the file",
        ),
        ("a.jsonl", b'{"a": "\\ud800"}', "a.jsonl, line 1: holds half of a surrogate pair"),
        ("a.jsonl", b"", "a.jsonl: no rows"),
        ("a.jsonl", b"\n \n", "a.jsonl: no rows"),
        ("a.csv", b'a,b\n"x\ny",1\n2\n', "a.csv, line 4: 1 fields where the header has 2"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", "a.csv, line 3: 3 fields where the header has 2"),
        ("a.csv", b'a,b\n1,2\n"1,2\n3,4\n', "a.csv, line 3: not valid CSV"),
        ("a.csv", b"a,a\n1,2\n", "a.csv, line 1: two columns are named 'a'"),
        ("a.csv", b"a\n1\n\xe9\n", "a.csv, line 3: not UTF-8 text"),
        ("a.csv", b"a,b\n", "a.csv: no rows"),
        ("a.csv", b"", "a.csv: no rows"),
        ("a.parquet", b"PAR1", "a.parquet: not a readable Parquet file"),
        ("a.txt", b"hello", "a.txt: unknown kind of data file; use one of .jsonl, .ndjson, .json"),
    ],
)
def test_broken_file_is_named_with_its_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    """Whoever mends the file is told where to look."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=re.escape(message)):
        read_rows(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_missing_file(tmp_path: Path, name: str) -> None:
    """A file that is not there is said to be so, whatever its kind."""
    with pytest.raises(DataError, match=f"{name}: no such file or folder"):
        read_rows(tmp_path / name)


def test_other_folders(tmp_path: Path) -> None:
    """A folder that is no data set, or a damaged one, is not taken for one."""
    with pytest.raises(DataError, match=r"not a folder written by Dataset\.save_to_disk"):
        read_rows(tmp_path)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(DataError, match="not a readable data set"):
        read_rows(tmp_path)


def test_parquet_without_rows(tmp_path: Path) -> None:
    """A Parquet file with columns only is empty, too."""
    import datasets

    datasets.Dataset.from_dict({"text": []}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: no rows"):
        read_rows(tmp_path / "a.parquet")


def test_parquet_groups_without_rows(tmp_path: Path) -> None:
    """As pyarrow writes them; they hide neither that there are no rows nor those that follow."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    empty, full = (pa.table({"text": pa.array(rows, pa.string())}) for rows in ([], ["a", "b"]))
    pq.write_table(empty, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: no rows"):
        read_rows(tmp_path / "a.parquet")
    with pq.ParquetWriter(tmp_path / "b.parquet", empty.schema) as writer:
        writer.write_table(empty)
        writer.write_table(full)
    assert read_rows(tmp_path / "b.parquet") == [{"text": "a"}, {"text": "b"}]
