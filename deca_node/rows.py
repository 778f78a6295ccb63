"""Rows from a file of this machine, as plain dicts. The only file that imports ``datasets``."""

import csv
import glob
import io
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from deca_node.errors import DataError, first_line

MAX_CSV_FIELD = 2**31 - 1  # characters; the csv module's own 131,072 is less than a long article
ROWS_AT_ONCE = 1024  # of a Parquet file


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read all rows of a data set; nothing is written beside it and nothing is downloaded.

    JSON Lines, CSV with a header line (values are strings), Parquet, or a folder that
    ``Dataset.save_to_disk`` wrote. Blank lines do not count as rows.

    Raises:
        DataError: naming the file and, where the file has lines, the line.
    """
    try:
        if path.is_dir():
            rows = _read_saved(path)
        elif (reader := _READERS.get(path.suffix.lower())) is None:
            raise DataError(
                f"{path}: unknown kind of data file; use one of {', '.join(_READERS)}"
                " or a folder written by Dataset.save_to_disk"
            )
        else:
            rows = reader(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file or folder") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not rows:
        raise DataError(f"{path}: no rows")
    return rows


def _read_text(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: not UTF-8 text ({error.reason}); save the file as UTF-8"
        ) from None


def _read_json_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    # Not splitlines(): JSON strings may hold U+2028 and its like as they are.
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise DataError(
                f"{where}: not valid JSON ({reason}); each line must be one JSON object"
            ) from None
        if not isinstance(row, dict):
            raise DataError(f"{where}: a JSON {_json_type(row)}; each line must be one JSON object")
        if "\\u" in line and not _encodable(row):
            raise DataError(f"{where}: holds half of a surrogate pair, which is not valid text")
        rows.append(row)
    return rows


def _json_type(value: Any) -> str:
    names = {list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _encodable(row: dict[str, Any]) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_csv(path: Path) -> list[dict[str, Any]]:
    csv.field_size_limit(MAX_CSV_FIELD)
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    header: list[str] = []
    rows = []
    line = 1
    try:
        for values in reader:
            if not values:
                pass
            elif not header:
                header = values
                if twice := [name for name, count in Counter(header).items() if count > 1]:
                    raise DataError(f"{path}, line {line}: two columns are named {twice[0]!r}")
            elif len(values) != len(header):
                raise DataError(
                    f"{path}, line {line}: {len(values)} fields where the header has {len(header)}"
                )
            else:
                rows.append(dict(zip(header, values, strict=True)))
            line = reader.line_num + 1  # a quoted field may span lines: name the first of them
    except csv.Error as error:
        raise DataError(f"{path}, line {line}: not valid CSV ({error})") from None
    return rows


def _datasets() -> Any:
    """The ``datasets`` module: quiet, and barred from the network."""
    import datasets  # noqa: PLC0415 - takes more than a second, and JSON Lines and CSV do without

    datasets.config.HF_HUB_OFFLINE = True
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs, it raises too
    return datasets


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    path.open("rb").close()  # the system's own words for a missing or unreadable file
    reader = _datasets().Dataset.from_parquet
    try:
        # Streaming makes no Arrow copy of private data; all that the cache gets is a lock file.
        with tempfile.TemporaryDirectory() as cache:
            pattern = glob.escape(str(path.absolute()))
            # By itself it reads in batches as large as the first row group, which may be empty.
            found = reader(pattern, cache_dir=cache, streaming=True, batch_size=ROWS_AT_ONCE)
            return _plain(found, found.features)
    except Exception as error:  # whatever the reader trips over, the file is to blame
        raise DataError(f"{path}: not a readable Parquet file ({first_line(error)})") from error


def _read_saved(path: Path) -> list[dict[str, Any]]:
    if (path / "dataset_dict.json").is_file():
        splits = sorted(entry.parent.name for entry in path.glob("*/state.json"))
        raise DataError(
            f"{path}: a DatasetDict with the splits {', '.join(splits)}; name the folder of one"
        )
    if not (path / "state.json").is_file():
        raise DataError(f"{path}: not a folder written by Dataset.save_to_disk")
    reader = _datasets().load_from_disk
    try:
        found = reader(str(path))
        return _plain(found.to_list(), found.features)
    except Exception as error:  # as above
        raise DataError(f"{path}: not a readable data set ({first_line(error)})") from error


def _plain(rows: Iterable[dict[str, Any]], features: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows with binary text as text, and with the names of labels that are kept as numbers."""
    class_label = _datasets().ClassLabel
    names = {
        column: dict(enumerate(feature.names))
        for column, feature in features.items()
        if isinstance(feature, class_label)
    }
    return [
        {
            # -1 stands for no label, as in a test split whose labels are secret.
            column: names[column].get(value) if column in names else _decoded(value)
            for column, value in row.items()
        }
        for row in rows
    ]


def _decoded(value: Any) -> Any:
    """Binary text as text; other bytes stay, for a field that nothing reads may be a picture."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    if isinstance(value, list):
        return [_decoded(each) for each in value]
    if isinstance(value, dict):
        return {name: _decoded(each) for name, each in value.items()}
    return value


_READERS: Mapping[str, Callable[[Path], list[dict[str, Any]]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json_lines,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def place(source: Path, index: int) -> str:
    """How messages name the row at ``index``: counted from 1, a CSV's header not counted."""
    return f"{source}, row {index + 1}"
