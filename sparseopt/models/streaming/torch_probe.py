"""How a torch model's parts go together, tested on a few tokens before it is relied on.

Blocks can run one by one only if a block returns one stream, which the next block takes unchanged; if the other
arguments of a block depend on the shape of the tokens alone; if the head reads the last stream alone; and if a token
does not see later ones. Each is tested, and what fails is refused by name: a wrong model is worse than none.
"""

from typing import Any, NamedTuple, NoReturn

from sparseopt.models.base.errors import ModelError, guarded
from sparseopt.models.streaming.torch_bridge import linears_of, stream_of, torch_device, watched, with_stream
from sparseopt.models.streaming.torch_skeleton import Call, Skeleton, Tensors

# Relative to the largest value; runs on other tokens round differently.
TOLERANCE = 1e-5


class Findings(NamedTuple):
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
    tokens = torch.tensor([[1, 2, 3], [1, 2, 4]], device=torch_device()) % skeleton.config.vocab_size
    # Kept now: during a run the blocks' forward functions are replaced.
    forward, linears = skeleton.blocks[0].forward, linears_of(skeleton.blocks[0])
    calls: list[Call] = []
    other_calls: list[Call] = []
    output: Any = None
    after: Any = None
    writes_input = False

    def refuse(what: str) -> NoReturn:
        raise ModelError(f"a {skeleton.model_type} model cannot be run block by block: {what}")

    def only_first(index: int, stream: Any, call: Call) -> Any:
        nonlocal output, after, writes_input
        calls.append(call)
        if index:
            if stream is not after and not torch.equal(stream, after):
                refuse(f"the stream is changed before block {index}")
            return with_stream(output, after)
        if stream.ndim != 3 or tuple(stream.shape[:2]) != (2, 3):
            refuse(f"for 2 windows of 3 tokens its stream has the shape {list(stream.shape)}")
        arguments, keywords = call.with_stream(stream)
        before = stream._version
        with watched(linears, index):
            output = forward(*arguments, **keywords)
        writes_input = stream._version != before
        after = stream_of(output)
        if not isinstance(after, torch.Tensor) or after.shape != stream.shape:
            refuse("a block does not return a stream of the shape that it is given")
        return output

    def none(index: int, stream: Any, call: Call) -> Any:
        other_calls.append(call)
        return with_stream(output, after if index == skeleton.last else stream)

    logits = skeleton.run(outer | first, tokens, only_first)
    if not _close(after[0, :2], after[1, :2]):
        refuse("a token sees later tokens, so it is no causal language model")
    other_logits = skeleton.run(outer, (tokens + 3) % skeleton.config.vocab_size, none)
    if not len(calls) == len(other_calls) == len(skeleton.blocks):
        refuse(f"it calls {len(other_calls)} of its {len(skeleton.blocks)} blocks")
    for index, (one, other) in enumerate(zip(calls, other_calls, strict=True)):
        if not _same(one, other):
            refuse(f"what block {index} is given depends on more than the shape of the tokens")
    if not _close(logits, other_logits):
        refuse("its logits depend on more than the stream after the last block")
    return Findings(output, writes_input)


def _close(one: Any, other: Any) -> bool:
    import torch

    return torch.allclose(one, other, rtol=0, atol=TOLERANCE * float(one.abs().max()), equal_nan=True)


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
