"""The sizes and switches of a decoder, which every family's reader fills in."""

from dataclasses import dataclass
from typing import Literal

from sparseopt.models.base.errors import ModelError
from sparseopt.models.base.rope import Rope
from sparseopt.models.decoder.layers import NormKind


@dataclass(frozen=True)
class BlockKind:
    """Settings that may differ from block to block.

    Attributes:
        rope: the position embedding; None for none.
        window: a query sees itself and `window - 1` positions before it; None for all.
        experts: whether the MLP is a mixture of experts.
    """

    rope: Rope | None
    window: int | None = None
    experts: bool = False


@dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts.

    Attributes:
        count: E, number of experts.
        chosen: number of experts that each token is sent to.
        intermediate_size: F of every expert.
        normalise: the chosen experts' shares are divided by their sum.
    """

    count: int
    chosen: int
    intermediate_size: int
    normalise: bool


@dataclass(frozen=True)
class DecoderConfig:
    """The sizes and switches of a decoder; hashable, so it can be static under jit.

    Attributes:
        vocab_size: V, rows of the embedding.
        hidden_size: D, width of the residual stream.
        intermediate_size: F, width inside the MLP.
        num_heads: N, query heads.
        num_kv_heads: K, key and value heads; divides N.
        head_dim: H.
        norm_eps: added to the mean square in norms.
        kinds: the kind of every block, in order.
        tied: whether the head uses the embedding matrix.
        norm: the kind of all norms.
        norms: the norms that a block has: `attention_norm` and `mlp_norm` before, `attention_post_norm` and
            `mlp_post_norm` after the part.
        parallel: attention and MLP both read the block's input, through one norm if `norms` has no `mlp_norm`.
        qkv: q, k and v are three layers, or one layer with rows q, k, v ("fused") or q, k, v of each head
            ("interleaved").
        qk_norm: queries and keys are normalised, each head alone ("head") or all heads together ("width").
        qkv_bias: q, k and v projections have a bias.
        output_bias: the attention's output projection has one.
        score_scale: factor of the products of queries and keys; None for `1 / sqrt(H)`.
        score_cap: c in `c tanh(score / c)`; None for none.
        gate: the MLP is `down(act(gate) * up)` with two layers or one layer with rows gate, up ("fused");
            None for `down(act(up))`.
        activation: as Hugging Face calls it, a name of `ACTIVATIONS`.
        mlp_bias: the MLP's layers have a bias.
        experts: the mixture, if a block's kind has one.
        residual_scale: factor of what attention and MLP add to the residual stream.
        embedding_scale: factor of embedded tokens.
        learned_positions: each position has a row of a table, `position_offset + max_positions` rows in all.
        position_offset: the row of the first position.
        logit_scale: factor of the head's products, before the cap.
        logit_cap: c in `c tanh(logit / c)`; None for none.
        max_positions: tokens of the longest window that the model supports; None if its configuration does not say.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    kinds: tuple[BlockKind, ...]
    tied: bool
    norm: NormKind = "rms"
    norms: tuple[str, ...] = ("attention_norm", "mlp_norm")
    parallel: bool = False
    qkv: Literal["separate", "fused", "interleaved"] = "separate"
    qk_norm: Literal["head", "width"] | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    score_scale: float | None = None
    score_cap: float | None = None
    gate: Literal["separate", "fused"] | None = "separate"
    activation: str = "silu"
    mlp_bias: bool = False
    experts: ExpertsConfig | None = None
    residual_scale: float = 1.0
    embedding_scale: float = 1.0
    learned_positions: bool = False
    position_offset: int = 0
    logit_scale: float = 1.0
    logit_cap: float | None = None
    max_positions: int | None = None

    @property
    def num_layers(self) -> int:
        return len(self.kinds)

    def rotations(self, time: int) -> bytes:
        """The rotary frequencies of a window of `time` tokens; windows with equal ones may replace each other."""
        ropes = [kind.rope for kind in dict.fromkeys(self.kinds) if kind.rope is not None]
        return b"".join(rope.frequencies(self.head_dim, time).tobytes() for rope in ropes)


def check_window(tokens: int, max_positions: int | None) -> None:
    """Raise a `ModelError` if a window has more tokens than the model's `max_positions`; None allows any number."""
    if max_positions is not None and tokens > max_positions:
        raise ModelError(
            f"a window of {tokens} tokens is longer than the {max_positions} positions that the model supports; "
            "use a shorter one"
        )
