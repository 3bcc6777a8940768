"""Floor 5: calls into the tokenizers package, which raises plain `Exception` and, where its Rust code panics, worse."""

from collections.abc import Callable
from typing import TypeVar

from sparseopt.models.errors import ModelError

T = TypeVar("T")


def guarded(build: Callable[[], T], what: str) -> T:
    """What `build` makes with the tokenizers package.

    Args:
        build: makes it.
        what: begins the error's text: which input cannot be used.

    Raises:
        ModelError: for whatever the package raises. Its panics derive from `BaseException` and pass through handlers of
            `Exception`.
    """
    try:
        return build()
    except ModelError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ModelError(f"{what} ({str(error)[:300]}); download it again") from error
        raise
