"""What a document is: a text, or a chat as a list of messages."""

import json
import sys
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

# A message has a role, a content and further fields that a chat template reads.
Document = str | list[dict[str, Any]]

# The roles of ShareGPT, as chat templates call them.
_ROLES = {"human": "user", "gpt": "assistant"}


class TextError(ValueError):
    """Raised if a text cannot be read or is too short; the message says what to do."""


def is_data_set(given: Any) -> bool:
    """Whether an object is a `Dataset` of the package datasets."""
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(given, datasets.Dataset)


def is_text(calibration: Any) -> bool:
    """Whether a calibration is text (named, or a list or data set of documents) and not token ids."""
    if isinstance(calibration, Mapping) or type(calibration).__module__.startswith("datasets."):
        return True
    first = calibration[0] if isinstance(calibration, list | tuple) and calibration else calibration
    return isinstance(first, str) or (isinstance(first, list | tuple) and bool(first) and isinstance(first[0], dict))


def is_chat(document: Document) -> bool:
    """Whether a document is a list of messages."""
    return not isinstance(document, str)


def read_document(value: Any, place: str) -> Document | None:
    """A value of a column as a document, or None if it is missing; errors name its place.

    Raises:
        TextError: if it is neither a text nor a list of messages, or has characters that no tokenizer reads.
    """
    if value is None:
        return None
    if isinstance(value, str):
        return _characters(value, place)
    if not isinstance(value, list | tuple):
        raise TextError(f"{place} holds {type(value).__name__} where a text or a list of messages is expected")
    return [_read_message(each, place) for each in value]


def _known(given: Any) -> Any:
    """Remove the nulls that rows of one type have wherever other rows have a value."""
    return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given


class _Message(BaseModel):
    """A message as in chat templates: the content may be null besides tool calls, or a list of parts."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: str = Field(validation_alias=AliasChoices("role", "from"))
    content: str | list[Annotated[Any, BeforeValidator(_known)]] | None = Field(
        None, validation_alias=AliasChoices("content", "value")
    )

    _without_nulls = model_validator(mode="before")(_known)


def _read_message(given: Any, place: str) -> dict[str, Any]:
    try:
        found = _Message.model_validate(given)
    except ValidationError:
        found = None
    others: dict[str, Any] = (found and found.model_extra) or {}
    if found is None or (found.content is None and "tool_calls" not in others):
        raise TextError(
            f"{place}: a message needs a role and a content, or from and value, given {repr(given)[:80]}; a content is "
            "a text, a list of parts, or null beside tool_calls"
        )
    for text in (found.content, json.dumps([found.content, others], ensure_ascii=False, default=str)):
        if isinstance(text, str):
            _characters(text, place)
    return {"role": _ROLES.get(found.role, found.role), "content": found.content, **others}


def _characters(text: str, place: str) -> str:
    """The text itself; a `TextError` for half a surrogate pair, which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextError(
            f"{place}: character {error.start + 1} is {text[error.start]!a}, half of a surrogate pair, as a cut "
            "emoji leaves it; remove it"
        ) from None
    return text
