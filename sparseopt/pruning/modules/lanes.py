"""Forward passes of one module on many batches, in step: each stops where it calls a part that is to be pruned.

Every batch goes through a part as it was, to observe it, and again when it is pruned. Nothing is assumed about what the
module does between its parts. A lane is a thread; only one runs at a time. While it waits, it holds what the forward
pass holds.
"""

import contextvars
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import jax

# JAX's context settings apply to one thread only: a pass uses the settings of the thread that began it.
_CONTEXTS: dict[str, Callable[[Any], Any]] = {
    "jax_default_matmul_precision": jax.default_matmul_precision,
    "jax_default_device": jax.default_device,
    "jax_enable_x64": jax.enable_x64,
    "jax_numpy_dtype_promotion": jax.numpy_dtype_promotion,
    "jax_debug_nans": jax.debug_nans,
}


def _settings() -> tuple[dict[str, Any], Any]:
    return {name: getattr(cast(Any, jax.config), name) for name in _CONTEXTS}, jax.sharding.get_mesh()


@contextmanager
def _with_settings(wanted: dict[str, Any], mesh: Any) -> Iterator[None]:
    # A program traced under another setting is traced again, so only what differs is set.
    with ExitStack() as stack:
        own, own_mesh = _settings()
        for name, value in wanted.items():
            if own[name] != value:
                stack.enter_context(_CONTEXTS[name](value))
        if mesh != own_mesh:
            stack.enter_context(jax.set_mesh(mesh))
        yield


@dataclass(frozen=True)
class PartCall:
    """A call of a part of a module.

    Attributes:
        name: of the part.
        args: its positional arguments.
        kwargs: its keyword arguments.
        function: runs it as it is now, with such arguments.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    function: Callable[..., Any]

    def run(self) -> Any:
        """Run the part, within the pass that called it."""
        return self.function(*self.args, **self.kwargs)


class _Ended(BaseException):
    """Ends a forward pass before its end."""


class Lane:
    """One forward pass.

    Attributes:
        at: the call before which it waits; None when it has ended.
        batch: the number of its batch, which its errors name.
    """

    def __init__(self, forward: Callable[["Lane"], Any], batch: int) -> None:
        self.at: PartCall | None = None
        self.batch = batch
        self._forward = forward
        self._error: BaseException | None = None
        self._goes, self._stops = threading.Semaphore(0), threading.Semaphore(0)
        self._work: Callable[[], Any] | None = None
        self._answer: Any = None
        self._ends = False
        self._settings = _settings()
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._main,), daemon=True)
        self._thread.start()

    @property
    def call(self) -> PartCall:
        """The call before which it waits."""
        assert self.at is not None
        return self.at

    def resume(self, output: Any = None) -> None:
        """Continue, with this output of the part, to the next stop or the end; raises what the module raises."""
        self._answer = output
        self._switch()

    def work(self, function: Callable[[], Any]) -> Any:
        """Run a function in the thread of the pass while it waits; return its result."""
        self._work = function
        self._switch()
        return self._answer

    def end(self) -> None:
        """Abandon the pass where it is."""
        if self._thread.is_alive():
            self._ends = True
            self._goes.release()
            self._thread.join()

    def stop_at(self, call: PartCall) -> Any:
        """The output of a part as the thread that owns the lane gives it; called by the pass."""
        while True:
            if self._ends:
                raise _Ended  # again, if the module caught it
            self.at = call
            self._stops.release()
            self._goes.acquire()
            if self._ends:
                continue
            if self._work is None:
                self.at = None
                return self._answer
            work, self._work = self._work, None
            try:
                self._answer = work()
            except Exception as error:  # reported to the owner; the pass stays where it was
                self._error = error

    def _switch(self) -> None:
        self._goes.release()
        self._stops.acquire()
        if self._error is not None:
            error, self._error = self._error, None
            error.add_note(f"in the pass of batch {self.batch}, counted from 0")
            raise error

    def _main(self) -> None:
        self._goes.acquire()
        try:
            if not self._ends:
                with _with_settings(*self._settings):
                    self._answer = self._forward(self)
        except _Ended:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.at = None
            self._stops.release()


@contextmanager
def lanes(forwards: Sequence[Callable[[Lane], Any]]) -> Iterator[list[Lane]]:
    """A lane for each forward pass, none started; all are abandoned at the end."""
    found: list[Lane] = []
    try:
        for forward in forwards:
            found.append(Lane(forward, len(found)))
        yield found
    finally:
        for lane in found:
            lane.end()
