"""The error class for reading, running and writing models, and helpers for its messages."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, core_schema

T = TypeVar("T")


class ModelError(ValueError):
    """Raised if a model cannot be read, run or written; says what was given, what was expected and what to do."""


def listed(names: Sequence[str], most: int = 8) -> str:
    """The first names, and the number of the others."""
    shown = ", ".join(name[:200] for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def bulleted(problems: Sequence[str], most: int = 20) -> str:
    """The first problems, one per line, and the number of the others."""
    shown = [*problems[:most], f"and {len(problems) - most} more"] if len(problems) > most else problems
    return "".join(f"\n  {problem}" for problem in shown)


def named(name: str, check: Callable[[], T]) -> T:
    """The result of checking a tensor; a `ValueError` becomes a `ModelError` that names the tensor."""
    try:
        return check()
    except ValueError as error:
        raise ModelError(f"{name}: {error}") from error


def guarded(build: Callable[[], T], what: str, advice: str = "; download it again") -> T:
    """The result of a call into another package; exceptions of any class become a `ModelError`.

    `what` begins the message, `advice` ends it. The tokenizers package raises plain `Exception` or, if its Rust code
    panics, a class derived from `BaseException`.
    """
    try:
        return build()
    except ModelError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ModelError(f"{what} ({type(error).__name__}: {str(error)[:300]}){advice}") from error
        raise


@dataclass(frozen=True)
class Said:
    """In an `Annotated` type: what the error says about a value of another type."""

    text: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.custom_error_schema(handler(source), "said", custom_error_message=self.text)


JSON_OBJECT = TypeAdapter(Annotated[dict[str, Any], Said("no JSON object")])


def checked(kind: TypeAdapter[T], value: Any, what: str, advice: str = "; download it again") -> T:
    """The value, if it is of that kind without conversion; otherwise a `ModelError` that begins with `what`."""
    try:
        return kind.validate_python(value, strict=True)
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        place = "".join(f"{str(part)[:200]}: " for part in wrong["loc"])
        raise ModelError(f"{what} ({place}{wrong['msg']}){advice}") from error
