"""Sizes of a Hugging Face model, which may be without values."""

from dataclasses import dataclass
from typing import Any

# How modules and buffers are called whose rows belong to positions.
_POSITION_TABLES = ("wpe", "embed_positions", "position_embeddings", "positions_embed")


@dataclass(frozen=True)
class Capacity:
    """Bounds on what a model can take.

    Attributes:
        ids: rows of the input embedding; a token's id must be less.
        positions: for how many tokens in a row it is made; 0 when its configuration names none.
        bound: whether it cannot take more.
    """

    ids: int
    positions: int
    bound: bool


def text_config(module: Any) -> Any:
    """The configuration of the language model, within that of a model that also sees or hears."""
    return module.config.get_text_config()


def embedding(module: Any) -> tuple[int, int]:
    """Rows and width of the input embedding."""
    rows, width = module.get_input_embeddings().weight.shape
    return int(rows), int(width)


def hidden(module: Any) -> int:
    """Width of what goes from layer to layer."""
    return int(getattr(text_config(module), "hidden_size", None) or embedding(module)[1])


def vocabulary(module: Any) -> int:
    """How many logits a position has."""
    return int(getattr(text_config(module), "vocab_size", None) or embedding(module)[0])


def capacity(module: Any) -> Capacity:
    """How large ids and how many tokens in a row a model can take.

    Positions are a bound where each has a row in a table (GPT-2, OPT, GPT-J). Where they turn
    (RoPE) it merely has not been trained on more.
    """
    return Capacity(embedding(module)[0], *_positions(module))


def _positions(module: Any) -> tuple[int, bool]:
    config = text_config(module)
    if length := getattr(config, "max_seq_len", None):  # MPT, whose biases have that size
        return int(length), True
    made = int(getattr(config, "max_position_embeddings", None) or 0)
    if made < 1:  # XLNet says -1
        return 0, False
    tables = [
        *((name, each.weight, each) for name, each in module.named_modules() if _is_table(each)),
        *((name, each, None) for name, each in module.named_buffers()),
    ]
    bound = any(
        # OPT's rows begin with some of padding.
        len(rows) - int(getattr(owner, "offset", 0)) == made
        for name, rows, owner in tables
        if name.rpartition(".")[2] in _POSITION_TABLES
    )
    return made, bound


def _is_table(module: Any) -> bool:
    return getattr(module, "num_embeddings", None) is not None
