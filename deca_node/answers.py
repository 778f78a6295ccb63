"""Answers of a model to questions, in the format that MT-Bench's judges read.

Questions and answers are FastChat's, JSON Lines both: a question has ``question_id`` and ``turns``,
what a user says one after the other; an answer has ``question_id``, ``answer_id``, ``model_id``,
``choices`` (one, with the model's turns) and ``tstamp``. An ``answer_id`` begins with a digest of
the model, so that a file is gone on with by the model that began it.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from deca_node import houlsby, memory
from deca_node.config import ModelSettings
from deca_node.disk import translated
from deca_node.errors import DataError, OutputError
from deca_node.models import LanguageModel, pick_device
from deca_node.rows import read_rows

# What a line of answers begins with, also one that a crash has torn.
_BEGIN = b'{"question_id"'


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        id: its number or name.
        turns: what the user says, one after the other; at least one.
    """

    id: int | str
    turns: Sequence[str]


def read_questions(path: Path) -> list[Question]:
    """Read a file of questions.

    Raises:
        DataError: naming the file and the question.
    """
    found: dict[int | str, Question] = {}
    for number, row in enumerate(read_rows(path), start=1):
        where = f"{path}, question {number}"
        name, turns = row.get("question_id"), row.get("turns")
        if not isinstance(name, int | str) or isinstance(name, bool):
            raise DataError(f"{where}: question_id must be a number or a string")
        if not isinstance(turns, list) or not turns or not all(isinstance(t, str) for t in turns):
            raise DataError(f"{where}: turns must be a list of strings, at least one")
        if name in found:
            raise DataError(f"{where}: question_id {name!r} occurs twice")
        found[name] = Question(name, turns)
    return list(found.values())


def write(
    folder: Path,
    questions: Path,
    to: Path,
    *,
    name: str | None = None,
    device: str = "auto",
    max_tokens: int = 512,
    tell: Callable[[str], None] = lambda _: None,
) -> int:
    """Let a model answer all questions that the file has no answers to yet.

    Each answer is written as it is there, so that an interrupted call is gone on with by the same
    call. Decoding is greedy: the same model gives the same answers.

    Args:
        folder: an exported model.
        questions: see :func:`read_questions`.
        to: file of answers, made or gone on with.
        name: the model's, for the judge; that of the folder when not given, or, since every export
            is called ``model``, of the one above.
        device: as ``node.device``.
        max_tokens: of one turn's answer, at most.
        tell: called with how far it is.

    Returns:
        How many answers were added.

    Raises:
        DataError: the questions cannot be used.
        ModelError: the model cannot be loaded, or has no chat template.
        DeviceError: an answer needs more memory.
        OutputError, DiskFullError: the answers cannot be written, or are another model's.
    """
    asked = read_questions(questions)
    who = name or _name(folder)
    done, end = _answered(to, who)
    left = [question for question in asked if question.id not in done]
    model = LanguageModel.load(ModelSettings(path=folder), pick_device(device))
    if (folder / houlsby.FILE).exists():
        houlsby.attach(model.module, folder)
    mark = _digest(model.weights_digest())
    if not all(str(answer).startswith(mark) for answer in done.values()):
        raise OutputError(
            f"{to}: holds answers of another model than {folder} (or of it in another precision, or"
            " from an earlier version of deca-node); choose another file"
        )
    less = "lower --max-tokens"
    if model.device.type != "cpu":
        less += ", or give --device cpu"
    with translated(to):
        to.parent.mkdir(parents=True, exist_ok=True)
        with to.open("a", encoding="utf-8") as file:
            file.truncate(end)  # a last line torn by a crash goes
            for number, question in enumerate(left, start=1):
                try:
                    with memory.suffices(model.device, less):
                        turns = _conversation(model, question, max_tokens)
                except DataError as error:
                    raise DataError(
                        f"{questions}, question_id {question.id!r}: {error} (--max-tokens)"
                    ) from None
                answer = {
                    "question_id": question.id,
                    "answer_id": mark + _digest(json.dumps([question.id, question.turns])),
                    "model_id": who,
                    "choices": [{"index": 0, "turns": turns}],
                    "tstamp": time.time(),
                }
                file.write(json.dumps(answer, ensure_ascii=False) + "\n")
                file.flush()
                tell(f"answered {len(asked) - len(left) + number} of {len(asked)}")
    return len(left)


def _name(folder: Path) -> str:
    """What tells a model's folder from others'."""
    whole = folder.resolve()
    return (whole.parent.name if whole.name == "model" else "") or whole.name


def _digest(text: str) -> str:
    return xxhash.xxh3_64_hexdigest(text.encode())


def _conversation(model: LanguageModel, question: Question, max_tokens: int) -> list[str]:
    said: list[dict[str, str]] = []
    for turn in question.turns:
        said.append({"role": "user", "content": turn})
        said.append({"role": "assistant", "content": model.answer(said, max_tokens)})
    return [message["content"] for message in said[1::2]]


def _answered(to: Path, who: str) -> tuple[dict[int | str, object], int]:
    """The ids of the file's answers by question, and its bytes without a last line that is torn."""
    if not to.exists():
        return {}, 0
    with translated(to):
        content = to.read_bytes()
    end = content.rfind(b"\n") + 1
    whole, torn = content[:end], content[end:]
    try:
        rows = [json.loads(line) for line in whole.splitlines() if line.strip()]
        others = {row["model_id"] for row in rows} - {who}
        done = {row["question_id"]: row["answer_id"] for row in rows}
    except (ValueError, LookupError, TypeError) as error:
        raise OutputError(f"{to}: does not hold answers ({error}); move it away") from None
    if not _BEGIN.startswith(torn[: len(_BEGIN)]):
        raise OutputError(f"{to}: does not hold answers (see its last line); move it away")
    if others:
        raise OutputError(
            f"{to}: holds answers of {min(others)}, not of {who}; choose another file"
        )
    return done, end
