"""What examples are made with: a model's tokenizer, as far as they need it."""

from collections.abc import Iterator, Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """What a task asks of a model's tokenizer. No method adds tokens that were not asked for."""

    @property
    def prefix(self) -> Sequence[int]:
        """The tokens that this model expects before every text: in most bos, or none."""

    @property
    def eos_id(self) -> int | None:
        """The token that ends a text, None when there is none."""

    @property
    def pad_id(self) -> int:
        """Any token of the vocabulary; it fills places that attention never sees."""

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text`` without special tokens."""

    def starts(self, text: str) -> tuple[list[int], list[int] | None]:
        """``encode``, and by token where in ``text`` it begins; None if that cannot be told."""

    def in_place(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """Token ids of consecutive texts, by text, each as it is after those before it."""

    def chat(self, messages: list[dict[str, str]], limit: int) -> list[tuple[list[int], bool]]:
        """A conversation's token ids in order, in segments.

        The flag is True where the segment is an assistant's text, which is to be learned; a blank
        one is not. What follows once there are more than ``limit`` tokens may be left out.

        Raises:
            ValueError: the model's chat template does not take these messages.
        """
