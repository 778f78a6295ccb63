"""Tables and pictures of an experiment's results.

Written beside the results, or elsewhere: report.md, table.csv and curves.csv (what the pictures are
drawn from), loss and disagreement as PNG and SVG; elsewhere also report.json, which says of which
experiment they are.
"""

import csv
import io
import json
import math
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console

from deca_node import config, status
from deca_node.disk import translated, write_atomically
from deca_node.errors import ConfigError, OutputError
from deca_node.experiment import World
from deca_node.laboratory import difference, read_cell
from deca_node.metrics import Band

# Points of a curve: more than a picture shows.
POINTS = 200
# Lines in one panel that can be told apart.
LINES = 6
# Share by which means of the same numbers can differ, summed in another order; far below one answer
# of a test, or what a method changes.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        key: what of a cell's summary.
        heading: of the column.
        written: a value as text.
        if_any: whether it is left out where all values are 0.
    """

    key: str
    heading: str
    written: Callable[[float], str]
    if_any: bool = False


_COLUMNS = (
    Column("before_accuracy", "before", "{:.3f}".format),
    Column("test_accuracy", "accuracy", "{:.3f}".format),
    Column("test_macro_f1", "macro F1", "{:.3f}".format),
    Column("test_accuracy_worst", "worst node", "{:.3f}".format),
    Column("test_accuracy_spread", "spread of nodes", "{:.3f}".format),
    Column("test_loss", "test loss", "{:.3f}".format),
    Column("before_perplexity", "before", "{:.4g}".format),
    Column("test_perplexity", "perplexity", "{:.4g}".format),
    Column("test_perplexity_worst", "worst node", "{:.4g}".format),
    Column("loss", "training loss", "{:.3f}".format),
    Column("disagreement", "disagreement", "{:.3g}".format),
    Column("bytes_sent", "MB sent a node", lambda value: f"{value / 1e6:.3g}"),
    Column("virtual_seconds", "virtual s", "{:.4g}".format),
    Column("incomplete_mixes", "incomplete mixes", "{:.3g}".format, if_any=True),
    Column("diverged", "diverged nodes", "{:.3g}".format, if_any=True),
    Column("unfinished", "unfinished nodes", "{:.3g}".format, if_any=True),
)


@dataclass(frozen=True)
class Measure:
    """What of two cells of one seed is compared.

    Attributes:
        key: what of a cell's summary.
        heading: of the column.
        written: a difference as text.
        sign: 1 where more is better, -1 where less is.
    """

    key: str
    heading: str
    written: Callable[[float], str]
    sign: int


_MEASURES = (
    Measure("test_accuracy", "accuracy", "{:+.3f}".format, 1),
    Measure("test_perplexity", "perplexity", "{:+.4g}".format, -1),
    Measure("test_loss", "test loss", "{:+.3f}".format, -1),
)
_DEFAULTS: Mapping[str, Any] = {
    key: info.get_default(call_default_factory=True)
    for fields in (config.keyed_fields(), config.keyed_fields(World))
    for key, info in fields
}


_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Group:
    """The cells that differ in their seed alone.

    Attributes:
        values: what the grid gives them, by dotted setting.
        cells: the rows of each.
    """

    values: Mapping[str, Any]
    cells: Sequence[Sequence[Mapping[str, Any]]]

    def of_summaries(self, key: str) -> list[float]:
        """A value of the cells' summaries, from each that has one."""
        found = [_value(cell[-1], key) for cell in self.cells]
        return [value for value in found if value is not None]

    def by_seed(self, key: str) -> dict[int, float]:
        """The same by the cells' seeds."""
        found = {cell[0]["seed"]: _value(cell[-1], key) for cell in self.cells}
        return {seed: value for seed, value in found.items() if value is not None}


def _value(summary: Mapping[str, Any], key: str) -> float | None:
    """A value of a cell's summary; None where it has none that is finite."""
    if key == "unfinished":
        return float(summary.get("nodes", 0) - summary.get("finished", 0))
    value = summary.get(key)
    return None if value is None else float(value)


def write(folder: Path, to: Path | None = None, against: Sequence[str] = ()) -> list[Path]:
    """Write the report on an experiment.

    Args:
        folder: of its results.
        to: where to; None is the same folder.
        against: the row that others are compared with, see ``baseline``.

    Returns:
        The files.

    Raises:
        ConfigError: ``against`` names no row.
        OutputError: there are no results, they are damaged, or the files cannot be written.
    """
    to = to or folder
    identity, groups = load(folder)
    files = {
        "report.md": markdown(identity, groups, against),
        "table.csv": _table_csv(groups),
        "curves.csv": _curves_csv(groups),
    }
    pictures = []
    with translated(to):
        to.mkdir(parents=True, exist_ok=True)
        _claim(to, folder, identity)
        pictures = _draw(groups, to, status.make_console())
        files["report.md"] += "".join(
            f"\n![{path.stem}]({path.name})\n" for path in pictures if path.suffix == ".png"
        )
        for name, text in files.items():
            write_atomically(to / name, text.encode())
    return [*(to / name for name in files), *pictures]


def _claim(to: Path, folder: Path, identity: Mapping[str, Any]) -> None:
    """A report is written over an older one of the same experiment, and over nothing else."""
    if to.samefile(folder):
        return
    if (to / "experiment.json").exists():
        raise OutputError(f"{to}: holds another experiment's results; choose another --to")
    mark = to / "report.json"
    try:
        owner = dict(json.loads(mark.read_bytes())["identity"])
    except FileNotFoundError:
        names = ["report.md", "table.csv", "curves.csv"]
        names += [f"{key}.{kind}" for key in _DRAWN for kind in ("png", "svg")]
        if there := [name for name in names if (to / name).exists()]:
            raise OutputError(
                f"{to}: which experiment {there[0]} belongs to is unknown; choose another --to or"
                " move it away"
            ) from None
        tree = {"identity": identity}
        write_atomically(mark, (json.dumps(tree, indent=1) + "\n").encode())
        return
    except (ValueError, KeyError, TypeError):
        raise OutputError(f"{mark}: damaged; choose another --to or move it away") from None
    if difference(owner, identity) is not None:
        raise OutputError(f"{to}: holds the report on another experiment; choose another --to")


def load(folder: Path) -> tuple[Mapping[str, Any], list[Group]]:
    """What an experiment is, and its results by what the grid gives them.

    Raises:
        OutputError: the folder holds no results, or damaged ones.
    """
    path = folder / "experiment.json"
    with translated(path):
        try:
            identity = dict(json.loads(path.read_bytes())["identity"])
        except FileNotFoundError:
            raise OutputError(
                f"{folder}: holds no results; `deca-node simulate` makes some"
            ) from None
        except (ValueError, KeyError, TypeError):
            raise OutputError(f"{path}: damaged") from None
    found: dict[str, list[list[dict[str, Any]]]] = {}
    for cell in sorted(folder.glob("cells/*.jsonl")):
        rows = read_cell(cell)
        found.setdefault(json.dumps(rows[0]["values"], sort_keys=True), []).append(rows)
    if not found:
        raise OutputError(f"{folder}: no cell is done yet; `deca-node simulate` goes on")
    groups = [Group(json.loads(values), cells) for values, cells in found.items()]
    keys = _keys(groups)
    return identity, sorted(groups, key=lambda group: [_order(group.values.get(k)) for k in keys])


def _order(value: Any) -> tuple[bool, float, str]:
    """Numbers by size, words by the alphabet."""
    number = isinstance(value, int | float)
    return not number, value if number else 0.0, str(value)


# The table


def markdown(
    identity: Mapping[str, Any], groups: Sequence[Group], against: Sequence[str] = ()
) -> str:
    """The tables, and below them what all cells have in common.

    Raises:
        ConfigError: ``against`` names no row (see ``baseline``).
    """
    headings, rows = table(groups)
    base = baseline(groups, against, identity)
    name = identity.get("experiment.name", "experiment")
    lines = [
        f"# {name}",
        "",
        "Mean ± sample standard deviation over seeds, where one has no finite value of the others"
        " (k of n); accuracy and macro F1 are means over the nodes, the worst node and the nodes'"
        " spread (population standard deviation) are taken in each run; before is the base model's."
        " Training loss: the last tenth of each node's steps. Disagreement: root mean square over"
        " nodes of ‖x_i − x̄‖ at the end; in the picture that of a step, ‖x½ − x_next‖, of steps"
        " with an exchange. Seconds are those of the virtual clock."
        + (
            " Some nodes did not finish (last column): scores and disagreement are of the others."
            if "unfinished nodes" in headings
            else ""
        ),
        "",
        *_lines(headings, rows),
        "",
        *_differences(groups, base),
        "Common to all:",
        "",
        *(
            f"- `{key}` = `{json.dumps(value)}`"
            for key, value in sorted(identity.items())
            if key != "grid" and key not in identity["grid"]
        ),
    ]
    return "\n".join(lines) + "\n"


def _lines(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [_line(headings), f"|{'---|' * len(headings)}", *map(_line, rows)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |"


def _differences(groups: Sequence[Group], base: Group) -> list[str]:
    headings, rows = paired(groups, base)
    keys = _keys(groups)
    if not rows or len(headings) == len(keys):
        return []
    named = _named(base, [key for key in keys if key in base.values])
    return [
        f"Differences from {named}, seed by seed: the cells of a seed share what it draws, while"
        " another seed has another split, test and graph. Mean ± sample standard deviation over"
        " the seeds that both have; ahead: on how many of these a row is better.",
        "",
        *_lines(headings, rows),
        "",
    ]


def baseline(
    groups: Sequence[Group], against: Sequence[str] = (), given: Mapping[str, Any] = _NOTHING
) -> Group:
    """The row that the others are compared with.

    Args:
        groups: all rows.
        against: SETTING=VALUE, which together name one row; none: the row with the most values
            that are defaults, the first of several. A row that leaves a setting out has the file's
            value, or the default; where no other fits it is named by that.
        given: what the file gives all rows, by dotted setting.

    Raises:
        ConfigError: no row has these values, or several have.
    """
    if not against:
        return max(groups, key=lambda group: sum(map(_is_default, group.values.items())))
    found = _fitting(groups, against, given)
    if len(found) != 1:
        example = _example(groups, given)
        raise ConfigError(
            f"--against {' --against '.join(against)}: {len(found) or 'none'} of the"
            f" {len(groups)} rows fit; give SETTING=VALUE, once for each that tells one row"
            + (f", as in {example}" if example else "")
        )
    return found[0]


def _fitting(
    groups: Sequence[Group], against: Sequence[str], given: Mapping[str, Any]
) -> list[Group]:
    """The rows that themselves have these values; where none has, those for which they hold."""
    whole = [{key: _held(group, key, given) for key in _keys(groups)} for group in groups]
    for values in ([group.values for group in groups], whole):
        found = [
            group
            for group, held in zip(groups, values, strict=True)
            if all(_has(held, *asked.split("=", 1)) for asked in against)
        ]
        if found:
            return found
    return []


def _held(group: Group, key: str, given: Mapping[str, Any]) -> Any:
    """A row's value of a setting, be it the grid's, the file's or the default; None of none."""
    if key in group.values:
        return group.values[key]
    if key != "run.method" and not config.has(str(_held(group, "run.method", given)), key):
        return None
    return given.get(key, _DEFAULTS.get(key))


def _is_default(item: tuple[str, Any]) -> bool:
    key, value = item
    return key in _DEFAULTS and bool(value == _DEFAULTS[key])


def _has(values: Mapping[str, Any], key: str, text: str = "") -> bool:
    value = values.get(key)
    if value is None:
        return False
    try:
        return bool(value == json.loads(text)) or text in (value, _text(value))
    except ValueError:
        return text in (value, _text(value))


def _example(groups: Sequence[Group], given: Mapping[str, Any]) -> str:
    """Options, as a shell takes them, that name one row; empty where none can be named."""
    keys = _keys(groups)
    for group in groups:
        whole = {key: _held(group, key, given) for key in keys}
        for values in (group.values, whole):
            asked = [f"{k}={_text(v)}" for k, v in values.items() if v is not None]
            if asked and _fitting(groups, asked, given) == [group]:
                return " ".join(f"--against {shlex.quote(each)}" for each in asked)
    return ""


def paired(groups: Sequence[Group], base: Group) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the other groups' differences from one, as text."""
    keys = _keys(groups)
    measures = [each for each in _MEASURES if base.of_summaries(each.key)]
    headings = _headings(keys)
    for measure in measures:
        headings += [measure.heading, f"{measure.heading}: ahead"]
    rows = []
    for group in groups:
        if group is base:
            continue
        row = [_text(group.values.get(key)) for key in keys]
        for measure in measures:
            theirs, ours = group.by_seed(measure.key), base.by_seed(measure.key)
            both = sorted(theirs.keys() & ours.keys())
            found = [_less(theirs[seed], ours[seed]) for seed in both]
            ahead = sum(measure.sign * value > 0 for value in found)
            row += [_mean_of(found, measure.written), f"{ahead} of {len(found)}" if found else "-"]
        rows.append(row)
    return headings, rows


def _less(value: float, other: float) -> float:
    """The difference; 0 where it is rounding's."""
    return 0.0 if math.isclose(value, other, rel_tol=ROUNDING) else value - other


def _mean_of(values: Sequence[float], written: Callable[[float], str]) -> str:
    if not values:
        return "-"
    mean = written(statistics.fmean(values))
    if len(values) == 1:
        return mean
    return f"{mean} ± {written(_deviation(values)).lstrip('+')}"


def table(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows, as text."""
    keys = _keys(groups)
    columns = [
        column
        for column in _COLUMNS
        if any(
            value or not column.if_any
            for group in groups
            for value in group.of_summaries(column.key)
        )
    ]
    headings = [*_headings(keys), "seeds", *(c.heading for c in columns)]
    rows = [
        [
            *(_text(group.values.get(key)) for key in keys),
            str(len(group.cells)),
            *(_plus_minus(group, column) for column in columns),
        ]
        for group in groups
    ]
    return headings, rows


def _plus_minus(group: Group, column: Column) -> str:
    values = group.of_summaries(column.key)
    written = _mean_of(values, column.written)
    told = not values or len(values) == len(group.cells)
    return written if told else f"{written} ({len(values)} of {len(group.cells)})"


def _headings(keys: Sequence[str]) -> list[str]:
    """The settings' last words, where they tell them apart."""
    words = [key.rpartition(".")[2] for key in keys]
    return [word if words.count(word) == 1 else key for key, word in zip(keys, words, strict=True)]


def _keys(groups: Sequence[Group]) -> list[str]:
    return sorted({key for group in groups for key in group.values})


def _text(value: Any) -> str:
    if value is None:
        return "-"
    # A line break would end a table's row.
    if isinstance(value, str) and value.isprintable():
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def _table_csv(groups: Sequence[Group]) -> str:
    keys = _keys(groups)
    scores = list(dict.fromkeys(key for g in groups for cell in g.cells for key in cell[-1]))
    scores.remove("kind")
    return _csv(
        [*keys, "seed", *scores],
        (
            [
                *(_text(group.values.get(key)) for key in keys),
                cell[0]["seed"],
                *(cell[-1].get(score, "") for score in scores),
            ]
            for group in groups
            for cell in group.cells
        ),
    )


# The curves


def points(group: Group, key: str) -> Band:
    """The curve of a value of the steps: at most POINTS of it, of as many steps each.

    Mean over nodes, then over cells; by steps of the run, counted from 1. The same steps for each
    value; NaN where there is none, and where one of a node is not finite: the mean of the others
    would be better the more of them diverge. Hostile nodes are left out, as in a summary.
    """
    curves = [_of_cell(cell, key) for cell in group.cells]
    length = max(map(len, curves))
    width = -(-length // POINTS)
    steps, means, spreads = [], [], []
    broken: set[float] = set()
    for low in range(0, length, width):
        part = [_mean(curve[low : low + width]) for curve in curves]
        values = [value for value in part if value is not None]
        steps.append(low + (min(width, length - low) + 1) / 2)
        whole = bool(values) and not any(map(math.isnan, values))
        if values and not whole:
            broken.add(steps[-1])
        means.append(statistics.fmean(values) if whole else math.nan)
        spreads.append(_deviation(values) if whole else math.nan)
    return Band(steps, means, spreads, broken)


def _of_cell(cell: Sequence[Mapping[str, Any]], key: str) -> list[float | None]:
    """By step of the run, the mean over nodes; NaN where one is not finite, None of none."""
    steps = cell[0]["settings"]["schedule"]["steps"]
    hostile = cell[0].get("world", {}).get("faults", {}).get("attacks", {})
    values: dict[int, list[float]] = {}
    for row in cell:
        if row["kind"] != "step" or row["node"] in hostile:
            continue
        found = values.setdefault(row["visit"] * steps + row["step"], [])
        # A step without an exchange has no disagreement, rather than one of 0.
        if key != "disagreement" or row["neighbours"]:
            found.append(math.nan if row[key] is None else row[key])
    return [_mean(values.get(serial, [])) for serial in range(max(values, default=0) + 1)]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _deviation(values: Sequence[float]) -> float:
    """Of a sample; 0 where there is one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


_DRAWN = {
    "loss": ("training loss, mean of nodes", False),
    "disagreement": ("disagreement ‖x½ − x_next‖, mean of nodes", True),
}


def _curves_csv(groups: Sequence[Group]) -> str:
    keys = _keys(groups)
    rows: list[list[Any]] = []
    for group in groups:
        named = [_text(group.values.get(key)) for key in keys]
        found = [points(group, key) for key in _DRAWN]
        for place, step in enumerate(found[0].steps):
            numbers = [_number(x[place]) for each in found for x in (each.mean, each.spread)]
            rows.append([*named, step, *numbers])
    headings = [heading for key in _DRAWN for heading in (key, f"{key}_std")]
    return _csv([*keys, "step", *headings], rows)


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.5g}"


def _csv(headings: Sequence[str], rows: Any) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(headings)
    writer.writerows(rows)
    return text.getvalue()


def panels(groups: Sequence[Group]) -> dict[str, dict[str, Group]]:
    """Title -> label of a line -> its cells: few lines a panel, told apart by their settings."""
    keys = _telling(groups)
    split: list[str] = []
    while len(split) < len(keys) - 1:
        most = max(_sizes(groups, split).values())
        if most <= LINES:
            break
        split.append(keys[len(split)])
    lines = [key for key in keys if key not in split]
    found: dict[str, dict[str, Group]] = {}
    for group in groups:
        title = _named(group, split)
        found.setdefault(title, {})[_named(group, lines) or "all"] = group
    return found


def _telling(groups: Sequence[Group]) -> list[str]:
    """The settings that it takes to tell the groups apart.

    Those go first that not all groups have, as a method's own; the method itself goes last.
    """
    keys = _keys(groups)

    def worth(key: str) -> tuple[bool, bool]:
        return key == "run.method", all(key in group.values for group in groups)

    for key in sorted(keys, key=worth):
        fewer = [each for each in keys if each != key]
        if len({_named(group, fewer) for group in groups}) == len(groups):
            keys = fewer
    return keys


def _sizes(groups: Sequence[Group], split: Sequence[str]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for group in groups:
        title = _named(group, split)
        sizes[title] = sizes.get(title, 0) + 1
    return sizes


def _named(group: Group, keys: Sequence[str]) -> str:
    return ", ".join(f"{key.rpartition('.')[2]} {_text(group.values.get(key))}" for key in keys)


def _draw(groups: Sequence[Group], folder: Path, console: Console) -> list[Path]:
    """The pictures' paths; nothing where matplotlib is absent."""
    try:
        from deca_node.plots import draw_curves  # noqa: PLC0415 - matplotlib is optional
    except ImportError:
        console.print("no pictures: they need matplotlib, pip install 'deca-node\\[plots]'")
        return []
    written = []
    for key, (label, log) in _DRAWN.items():
        drawn = {
            title: {name: points(group, key) for name, group in lines.items()}
            for title, lines in panels(groups).items()
        }
        positive = any(m > 0 for lines in drawn.values() for c in lines.values() for m in c.mean)
        paths = [folder / f"{key}.png", folder / f"{key}.svg"]
        draw_curves(drawn, label, paths, log=log and positive)
        written += paths
    return written
