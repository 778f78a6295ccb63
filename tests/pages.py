"""Pages of docs/ done as a reader would: their files written, their commands typed."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
# A command may load torch, transformers and a model on a busy machine.
PATIENCE = 180.0

_BLOCK = re.compile(r"^```(\w+)(?: title=(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Step:
    """A file to write, commands to type, or Python to run."""

    kind: str
    title: str
    text: str


def steps(page: str, instead: Mapping[str, str]) -> list[Step]:
    """What a page tells to do, in its order."""
    text = (DOCS / page).read_text(encoding="utf-8")
    for word, other in instead.items():
        text, count = re.subn(rf"\b{re.escape(word)}\b", other, text)
        assert count, f"{page} does not have {word!r} any more"
    found = _BLOCK.findall(text)
    return [Step(*one) for one in found if one[0] in ("console", "python") or one[1]]


def follow(page: str, folder: Path, instead: Mapping[str, str] | None = None) -> dict[str, str]:
    """Do all of it in a folder; what each command printed, by command.

    Args:
        page: its name in docs/.
        folder: where to type it.
        instead: words of the page that are other ones here, as hosts and ports.

    Raises:
        AssertionError: a command failed.
    """
    bin_folder = Path(sys.executable).parent
    surroundings = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    printed: dict[str, str] = {}
    for step in steps(page, instead or {}):
        if step.title:
            (folder / step.title).write_text(step.text, encoding="utf-8")
            continue
        if step.kind == "python":
            commands = [[sys.executable, "-c", step.text]]
        else:
            typed = re.findall(r"^\$ (.*(?:\\\n.*)*)$", step.text, re.MULTILINE)
            commands = [["bash", "-c", line] for line in typed]
        for command in commands:
            done = subprocess.run(
                command,
                cwd=folder,
                env=surroundings,
                capture_output=True,
                text=True,
                timeout=PATIENCE,
                check=False,
            )
            assert done.returncode == 0, f"{command[-1]}\n{done.stdout}{done.stderr}"
            printed[command[-1]] = done.stdout
    return printed
