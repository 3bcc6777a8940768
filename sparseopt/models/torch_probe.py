"""Floor 5: how a torch model's parts go together, tested on a few tokens before it is relied on.

Blocks can run one by one only if a block returns one stream, which the next block takes unchanged; if the other
arguments of a block depend on the shape of the tokens alone; if the head reads the last stream alone; and if a token
does not see later ones. Each is tested, and what fails is refused by name: a wrong model is worse than none.
"""

from dataclasses import dataclass
from typing import Any, NoReturn

from sparseopt.models.errors import ModelError, guarded
from sparseopt.models.torch_block import linears_of, stream_of, watched, with_stream
from sparseopt.models.torch_skeleton import Call, Ended, Skeleton, Tensors

# Relative to the largest value; runs on other tokens round differently.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Findings:
    """What the test found.

    Attributes:
        output: what a block returns; a stand-in answers in the same form.
        writes_input: blocks write into the stream that they are given.
    """

    output: Any
    writes_input: bool


def probe(skeleton: Skeleton, outer: Tensors, first: Tensors) -> Findings:
    """Run the model twice on a few tokens, once with its first block and once with all blocks replaced.

    `outer` are the tensors outside the blocks, `first` those of the first block, by their names in the model.

    Raises:
        ModelError: saying why the model cannot be run block by block.
    """
    what = f"transformers' {skeleton.model_type} model does not run as its configuration describes it"
    return guarded(lambda: _test(skeleton, outer, first), what, advice="")


def _test(skeleton: Skeleton, outer: Tensors, first: Tensors) -> Findings:
    import torch

    # Two windows that differ in their last token only.
    tokens = torch.tensor([[1, 2, 3], [1, 2, 4]]) % skeleton.config.vocab_size
    run = _FirstRun(skeleton)
    logits = skeleton.run(outer | first, tokens, run.visit)
    after = run.after
    if not _close(after[0, :2], after[1, :2]):
        _refuse(skeleton, "a token sees later tokens, so it is no causal language model")

    calls: list[Call] = []

    def replaced(index: int, stream: Any, call: Call) -> Any:
        calls.append(call)
        return with_stream(run.output, after if index == skeleton.last else stream)

    again = skeleton.run(outer, (tokens + 3) % skeleton.config.vocab_size, replaced)
    if not len(run.calls) == len(calls) == len(skeleton.blocks):
        _refuse(skeleton, f"it calls {len(calls)} of its {len(skeleton.blocks)} blocks")
    for index, (one, other) in enumerate(zip(run.calls, calls, strict=True)):
        if not _same(one, other):
            _refuse(skeleton, f"what block {index} is given depends on more than the shape of the tokens")
    if not _close(logits, again):
        _refuse(skeleton, "its logits depend on more than the stream after the last block")
    return Findings(run.output, run.writes_input)


class _FirstRun:
    """A run of the first block; the others return what they are given.

    Attributes:
        calls: of all blocks.
        output: of the first block.
        after: the stream after it.
        writes_input: it wrote into the stream that it was given.
    """

    def __init__(self, skeleton: Skeleton) -> None:
        self.calls: list[Call] = []
        self.output: Any = None
        self.after: Any = None
        self.writes_input = False
        self._skeleton = skeleton
        # Kept now: during the run the blocks' forward functions are replaced.
        self._forward, self._linears = skeleton.blocks[0].forward, linears_of(skeleton.blocks[0])

    def visit(self, index: int, stream: Any, call: Call) -> Any:
        import torch

        self.calls.append(call)
        if index:
            if stream is not self.after and not torch.equal(stream, self.after):
                _refuse(self._skeleton, f"the stream is changed before block {index}")
            return with_stream(self.output, self.after)
        if stream.ndim != 3 or tuple(stream.shape[:2]) != (2, 3):
            _refuse(self._skeleton, f"for 2 windows of 3 tokens its stream has the shape {list(stream.shape)}")
        arguments, keywords = call.with_stream(stream)
        before = stream._version
        with watched(self._linears, index):
            self.output = self._forward(*arguments, **keywords)
        self.writes_input = stream._version != before
        self.after = stream_of(self.output)
        if not isinstance(self.after, torch.Tensor) or self.after.shape != stream.shape:
            _refuse(self._skeleton, "a block does not return a stream of the shape that it is given")
        return self.output


def _refuse(skeleton: Skeleton, what: str) -> NoReturn:
    raise ModelError(f"a {skeleton.model_type} model cannot be run block by block: {what}")


def _close(one: Any, other: Any) -> bool:
    import torch

    return torch.allclose(one, other, rtol=0, atol=TOLERANCE * float(one.abs().max()), equal_nan=True)


def record_calls(skeleton: Skeleton, findings: Findings, frame: Tensors, batch: int, time: int) -> list[Call]:
    """How the model calls each of its blocks on `batch` windows of `time` tokens.

    `frame` are the tensors outside the blocks; the values of those as large as the vocabulary do not matter.
    """
    import torch

    calls: list[Call] = []

    def visit(index: int, stream: Any, call: Call) -> Any:
        calls.append(call)
        if index == skeleton.last:
            raise Ended
        return with_stream(findings.output, stream)

    skeleton.run(frame, torch.zeros((batch, time), dtype=torch.long), visit)
    return calls


def _same(one: Any, other: Any) -> bool:
    """Whether two arguments are equal; objects of unknown classes are compared by class only."""
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
