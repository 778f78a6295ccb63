"""A Hugging Face tokenizer, as rows of data are made into tokens by it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from deca_node.errors import ModelError, first_line

# Of a fast tokenizer's JSON, what decides which ids a text gets. What it puts around a text is seen
# from outside, how ids become a text again plays no part in training, and how much it cuts and pads
# depends on who called it last.
_BACKEND = ("added_tokens", "normalizer", "pre_tokenizer", "model")

# A line break ends whatever word was before and is no part of the next.
_NEUTRAL = "\n"


def tokenizer_digest(
    vocabulary: Mapping[str, int], backend: str, prefix: Sequence[int], eos_id: int | None
) -> str:
    """xxh3_128 of what makes tokens of a text; pure.

    Args:
        vocabulary: token -> id, added tokens included.
        backend: the fast tokenizer as JSON; empty of a slow one.
        prefix: what is put before a text.
        eos_id: what ends it.
    """
    tree = json.loads(backend) if backend else {}
    parts = {name: _said(tree.get(name)) for name in _BACKEND}
    parts["added_tokens"] = sorted(parts["added_tokens"] or [], key=lambda token: token["id"])
    model = parts["model"] or {}
    if isinstance(model.get("vocab"), dict):  # in the vocabulary; a Unigram's list has its scores
        del model["vocab"]
    # Releases of tokenizers write a merge as "a b" or as ["a", "b"].
    if "merges" in model:
        model["merges"] = [
            each if isinstance(each, str) else " ".join(each) for each in model["merges"]
        ]
    # One token, or none, as it was before there were models with more.
    before = list(prefix) if len(prefix) > 1 else next(iter(prefix), None)
    whole = [vocabulary, parts, before, eos_id]
    text = json.dumps(whole, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode())


def _said(tree: Any) -> Any:
    """Without what is off or empty: each release of tokenizers adds some such fields."""
    if isinstance(tree, list):
        return [_said(each) for each in tree]
    if not isinstance(tree, dict):
        return tree
    return {
        key: _said(value)
        for key, value in tree.items()
        if value is not None and value is not False and value != ""
    }


class Tokenizer:
    """A Hugging Face tokenizer as ``data.Tokenizer`` wants it.

    Attributes:
        prefix: the tokens that the tokenizer itself puts before a text: none, the bos token, or
            more (GLM-4).
        eos_id: the token that ends a text, None when there is none.
        pad_id: the padding token, or else ``eos_id``, or else 0.
    """

    def __init__(self, tokenizer: Any, path: Path) -> None:
        self.hf = tokenizer
        self._path = path
        # Data are cut to length by trying: hundreds of thousands of short texts. What the wrapper
        # adds to each takes longer than the tokens.
        self._fast = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        # Qwen and GPT-2 define a bos token that they never put before a text: ask, do not look up.
        whole: list[int] = tokenizer("a").input_ids
        own = self.encode("a")
        begins = (n for n in range(len(whole)) if own and whole[n : n + len(own)] == own)
        self.prefix = whole[: next(begins, int(whole[:1] == [tokenizer.bos_token_id]))]
        self.eos_id: int | None = tokenizer.eos_token_id
        pads = (tokenizer.pad_token_id, self.eos_id, 0)
        self.pad_id: int = next(token for token in pads if token is not None)

    def digest(self) -> str:
        """Equal on all nodes whose texts become the same tokens."""
        backend = "" if self._fast is None else self._fast.to_str()
        return tokenizer_digest(self.hf.get_vocab(), backend, self.prefix, self.eos_id)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text`` without special tokens."""
        if self._fast is None:
            ids: list[int] = self.hf(text, add_special_tokens=False, verbose=False).input_ids
        else:
            ids = self._fast.encode(text, add_special_tokens=False).ids
        return ids

    def starts(self, text: str) -> tuple[list[int], list[int] | None]:
        """``encode``, and by token the index of its first character; None of a slow tokenizer."""
        if self._fast is None:
            return self.encode(text), None
        encoding = self._fast.encode(text, add_special_tokens=False)
        return encoding.ids, [start for start, _ in encoding.offsets]

    def chat(self, messages: list[dict[str, str]], limit: int) -> list[tuple[list[int], bool]]:
        """A conversation's token ids in segments; True marks what the assistant says.

        Segments end once there are more than ``limit`` tokens.

        That is what the chat template makes of an assistant's message after the generation prompt,
        up to and with the token that ends its turn. A blank message is not learned, and neither is
        a first one whose begin the template does not mark.

        Raises:
            ModelError: the model has no chat template.
            ValueError: the template refuses these messages, or shows a message otherwise once
                others follow it, so that it cannot be told apart.
        """
        self._require_template()
        whole = self._render(messages)
        segments = []
        end = 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or not message["content"].strip():
                continue
            answered = self._render(messages[: index + 1])
            if index:
                prompt = self._render(messages[:index], add_generation_prompt=True)
            elif not (prompt := self._opening(answered)):
                continue
            # What follows the end-of-turn token, a line break in most templates, is not learned.
            said = answered[len(prompt) :].rstrip()
            # Templates of thinking models strip the (empty) thought from all but the last answer.
            bare = said[max(said.find(message["content"].strip()), 0) :]
            start = len(prompt)
            spoken = next((text for text in (said, bare) if whole.startswith(text, start)), "")
            if not (spoken and answered.startswith(prompt) and whole.startswith(prompt)):
                raise ValueError(f"message {index + 1} cannot be told apart in the rendered text")
            segments.append((whole[end:start], False))
            end = start + len(spoken)
            segments.append((whole[start:end], True))
        segments.append((whole[end:], False))
        found = []
        tokens = 0
        texts = [text for text, _ in segments]
        for ids, (_, flag) in zip(self.in_place(texts), segments, strict=False):
            found.append((ids, flag))
            tokens += len(ids)
            if tokens > limit:
                break
        return [(ids, flag) for ids, flag in found if ids]

    def in_place(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """Token ids of consecutive texts, by text, as those of all of them together.

        Not of each alone: SentencePiece puts its mark of a word's begin before a text's first, so
        that each would begin in another way than the model ever saw or will be asked to say. What
        stands before a text is what it is without it, as a prompt is; where a token would go
        over the border, a text of its own begins there, without a mark.
        """
        whole = "".join(texts)
        before, done = "", list[int]()
        begin = end = 0
        for text in texts:
            last, end = end, end + len(text)
            ids = self.encode(before + whole[begin:end])
            if ids[: len(done)] != done:
                begin, before, done = last, _NEUTRAL, self.encode(_NEUTRAL)
                ids = self.encode(before + text)
                if ids[: len(done)] != done:
                    before, done = "", []
                    ids = self.encode(text)
            yield ids[len(done) :]
            done = ids

    def _opening(self, answered: str) -> str:
        """What precedes the text of an assistant that speaks first; empty if that is not marked.

        No messages cannot be rendered, so the mark is taken from a question.
        """
        asked = [{"role": "user", "content": "a"}]
        mark = self._render(asked, add_generation_prompt=True).removeprefix(self._render(asked))
        before, found, _ = answered.partition(mark) if mark else ("", "", "")
        return before + found if found else ""

    def prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation up to where the assistant's turn begins.

        Raises:
            ModelError: the model has no chat template, or it refuses these messages.
        """
        self._require_template()
        try:
            return self.encode(self._render(messages, add_generation_prompt=True))
        except ValueError as error:
            raise ModelError(f"{self._path}: its chat template refuses: {error}") from None

    def _require_template(self) -> None:
        if self.hf.chat_template is None:
            raise ModelError(
                f"{self._path}: has no chat template; use the model's instruction-tuned version,"
                ' put a chat_template.jinja in its folder, or set data.task = "text"'
            )

    def _render(self, messages: list[dict[str, str]], **options: bool) -> str:
        try:
            return str(self.hf.apply_chat_template(messages, tokenize=False, **options))
        except Exception as error:  # noqa: BLE001 - a template is a program of the model's author
            raise ValueError(first_line(error)) from None


class Untokenized(Tokenizer):
    """Of a model without one, whose batches are made of numbers."""

    def __init__(self) -> None:
        self.hf = None
        self.prefix = []
        self.eos_id = None
        self.pad_id = 0
