"""A row's messages, through the model's chat template."""

from collections.abc import Mapping

from deca_node.batches import Example
from deca_node.config import DataSettings
from deca_node.data.fields import Row, names_of, text_of
from deca_node.data.tokens import Tokenizer
from deca_node.errors import DataError

ROLES = ("system", "user", "assistant", "tool")  # of messages; what their chat templates know


def instruction(
    settings: DataSettings, tokenizer: Tokenizer, row: Row, where: str
) -> list[Example] | str:
    """A row's example, or why there is none.

    Raises:
        DataError: the row has no messages, or none that the chat template takes.
    """
    messages, size = messages_of(row, settings, where), settings.max_tokens
    try:
        segments = tokenizer.chat(messages, size)
    except ValueError as error:
        raise DataError(f"{where}: the model's chat template refuses it: {error}") from None
    if unheard := _unheard(messages, settings, where):
        return unheard
    # A template's mark of a turn's end would be all that such a chat teaches.
    if not any(each["content"].strip() for each in messages if each["role"] == "assistant"):
        return "the answer is empty; fill it in"
    ids = [token for segment, _ in segments for token in segment]
    trained = [flag for segment, flag in segments for _ in segment]
    # Nothing predicts the first token, so it alone teaches nothing.
    if not any(trained[1:size]):
        if len(ids) > size:
            return f"nothing is learned within data.max_tokens = {size}; raise it"
        return "nothing comes before the answer; begin with a message of the user"
    return [Example(ids[:size], trained[:size])]


def messages_of(row: Row, settings: DataSettings, where: str) -> list[dict[str, str]]:
    """What a row's messages say; a prompt and its response are two.

    Raises:
        DataError: there are none, or not of text alone.
    """
    field = settings.messages_field
    if row.get(field) is None:
        if settings.prompt_field not in row:
            raise DataError(
                f"{where}: neither field {field!r} nor field {settings.prompt_field!r};"
                f" it has: {names_of(row)}"
            )
        return [
            {"role": "user", "content": text_of(row, settings.prompt_field, where)},
            {"role": "assistant", "content": text_of(row, settings.response_field, where)},
        ]
    messages = row[field]
    if not isinstance(messages, list) or not all(isinstance(entry, Mapping) for entry in messages):
        raise DataError(f"{where}: field {field!r} is not a list of {{role, content}} objects")
    if not messages:
        raise DataError(f"{where}: field {field!r} has no messages; remove the row")
    found = []
    for number, entry in enumerate(messages, start=1):
        place_in_row = f"{where}: message {number} of {field!r}"
        if entry.get("tool_calls"):  # each template writes them in its way; here they would be lost
            raise DataError(
                f"{place_in_row} has tool_calls, which are not trained; write the call into its"
                " content as the model is to say it, or remove the row"
            )
        found.append({key: text_of(entry, key, place_in_row) for key in ("role", "content")})
    return found


def _unheard(messages: list[dict[str, str]], settings: DataSettings, where: str) -> str:
    """Why a chat without an answer teaches nothing; most templates take any role as it is."""
    found = {message["role"] for message in messages}
    said = f"no message has the role 'assistant' (found: {', '.join(sorted(found))})"
    if found <= set(ROLES):
        return "" if "assistant" in found else f"{said}; add answers"
    if "assistant" not in found:
        raise DataError(f"{where}: {said}; rename them to user and assistant")
    number, role = next(
        (number, message["role"])
        for number, message in enumerate(messages, start=1)
        if message["role"] not in ROLES
    )
    raise DataError(
        f"{where}: message {number} of {settings.messages_field!r} has the role {role!r}, not one"
        f" of: {', '.join(ROLES)}; rename it"
    )
