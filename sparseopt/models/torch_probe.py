"""Floor 5: how a torch model's parts go together, tried out on a few tokens before it is relied on.

Blocks run one by one only if a block gives one stream, which the next block takes as it is; if what else a block is
given depends on the shape of the tokens alone; if the head sees the last stream alone; and if a token does not see
those behind it. Each is tested, and what fails is refused by name: a wrong model is worse than none.
"""

from dataclasses import dataclass
from typing import Any, NoReturn

from sparseopt.models.errors import ModelError
from sparseopt.models.torch_block import linears_of, refuse_uncalled, stream_of, watched, with_stream
from sparseopt.models.torch_skeleton import Call, Ended, Skeleton, Tensors

# Relative to the largest value; runs on other tokens round otherwise.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Findings:
    """What the trial found.

    Attributes:
        output: what a block gives, by whose form a stand-in answers.
        writes_input: blocks write into the stream that they get.
    """

    output: Any
    writes_input: bool


def probe(skeleton: Skeleton, outer: Tensors, first: Tensors) -> Findings:
    """Run the model twice on a few tokens, its first block for real and all blocks replaced.

    Args:
        skeleton: the model.
        outer: the tensors outside the blocks.
        first: the tensors of the first block, by their names in the model.

    Raises:
        ModelError: saying what about the model keeps it from being run block by block.
    """
    try:
        return _try_out(skeleton, outer, first)
    except ModelError:
        raise
    except Exception as error:  # whatever torch and transformers raise: inconsistent sizes, say
        raise ModelError(
            f"transformers' {skeleton.model_type} model does not run as its configuration describes it "
            f"({type(error).__name__}: {error})"
        ) from error


def _try_out(skeleton: Skeleton, outer: Tensors, first: Tensors) -> Findings:
    import torch

    # Two windows that differ in their last token only.
    tokens = torch.tensor([[1, 2, 3], [1, 2, 4]]) % skeleton.vocab_size
    run = _FirstRun(skeleton)
    logits = skeleton.run(outer | first, tokens, run.visit)
    behind = run.behind
    if not _close(behind[0, :2], behind[1, :2]):
        _refuse(skeleton, "a token sees those behind it, so it is no causal language model")

    calls: list[Call] = []

    def replaced(index: int, stream: Any, call: Call) -> Any:
        calls.append(call)
        return with_stream(run.output, behind if index == skeleton.num_blocks - 1 else stream)

    again = skeleton.run(outer, (tokens + 3) % skeleton.vocab_size, replaced)
    if not len(run.calls) == len(calls) == skeleton.num_blocks:
        _refuse(skeleton, f"it calls {len(calls)} of its {skeleton.num_blocks} blocks")
    for index, (one, other) in enumerate(zip(run.calls, calls, strict=True)):
        if not _same(one, other):
            _refuse(skeleton, f"what block {index} is given depends on more than the shape of the tokens")
    if not _close(logits, again):
        _refuse(skeleton, "its logits depend on more than the stream behind the last block")
    return Findings(run.output, run.writes_input)


class _FirstRun:
    """A run whose first block is real; the others give what they get.

    Attributes:
        calls: of all blocks.
        output: of the first block.
        behind: the stream behind it.
        writes_input: it wrote into the stream that it got.
    """

    def __init__(self, skeleton: Skeleton) -> None:
        self.calls: list[Call] = []
        self.output: Any = None
        self.behind: Any = None
        self.writes_input = False
        self._skeleton = skeleton
        # Taken now: while the model runs, its blocks' forwards are others.
        self._forward, self._linears = skeleton.blocks[0].forward, linears_of(skeleton.blocks[0])

    def visit(self, index: int, stream: Any, call: Call) -> Any:
        import torch

        self.calls.append(call)
        if index:
            if stream is not self.behind and not torch.equal(stream, self.behind):
                _refuse(self._skeleton, f"something happens to the stream in front of block {index}")
            return with_stream(self.output, self.behind)
        if stream.ndim != 3 or tuple(stream.shape[:2]) != (2, 3):
            _refuse(self._skeleton, f"for 2 windows of 3 tokens its stream has the shape {list(stream.shape)}")
        arguments, keywords = call.with_stream(stream)
        before, called = stream._version, set[str]()
        with watched(self._linears, lambda name, _: called.add(name)):
            self.output = self._forward(*arguments, **keywords)
        refuse_uncalled(self._linears, called, 0)
        self.writes_input = stream._version != before
        self.behind = stream_of(self.output)
        if not isinstance(self.behind, torch.Tensor) or self.behind.shape != stream.shape:
            _refuse(self._skeleton, "a block does not give a stream of the shape that it gets")
        return self.output


def _refuse(skeleton: Skeleton, what: str) -> NoReturn:
    raise ModelError(f"a {skeleton.model_type} model cannot be run block by block: {what}")


def _close(one: Any, other: Any) -> bool:
    import torch

    return torch.allclose(one, other, rtol=0, atol=TOLERANCE * float(one.abs().max()), equal_nan=True)


def record_calls(skeleton: Skeleton, findings: Findings, frame: Tensors, batch: int, time: int) -> list[Call]:
    """How the model calls each of its blocks on `batch` windows of `time` tokens.

    Args:
        skeleton: the model.
        findings: about it.
        frame: the tensors outside the blocks; the values of those as large as the vocabulary do not matter.
        batch: windows.
        time: tokens a window.
    """
    import torch

    calls: list[Call] = []

    def visit(index: int, stream: Any, call: Call) -> Any:
        calls.append(call)
        if index == skeleton.num_blocks - 1:
            raise Ended
        return with_stream(findings.output, stream)

    skeleton.run(frame, torch.zeros((batch, time), dtype=torch.long), visit)
    return calls


def _same(one: Any, other: Any) -> bool:
    """Whether two arguments are equal; of objects whose value is not known here the types are compared."""
    import torch

    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return one == other if isinstance(one, bool | int | float | str) else True
