"""Symmetric weights of few bits in safetensors, as stored by the compressed-tensors package ("pack-quantized").

    weight [out, in] = scale [out, groups] * multiple [out, in],    -2 ** (bits - 1) <= multiple < 2 ** (bits - 1)

    MODULE.weight_packed  int32 [out, ceil(in * bits / 32)]  multiple + 2 ** (bits - 1), from the lowest bits of a word
    MODULE.weight_scale   float [out, groups]                of in / groups consecutive inputs each
    MODULE.weight_shape   int64 [2]                          out and in

The bits are 4 or 8; a row ends with zero bits if it does not fill its last word. Otherwise the folder is a dense one.
transformers loads it if compressed-tensors is installed: config.json says how its weights are stored, see
`quantization_config`.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import ml_dtypes
import numpy as np
from jaxtyping import Float, Int
from pydantic import BaseModel, Field, ValidationError

from sparseopt.layers.bits import Bits, multiples_of
from sparseopt.models.base.errors import ModelError, bulleted
from sparseopt.models.files import safetensors
from sparseopt.models.files.safetensors import StoredTensor, TensorInfo, is_shape

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
WEIGHT = ".weight"
PACKED, SCALE, SHAPE = ENDINGS = (".weight_packed", ".weight_scale", ".weight_shape")
# Dtypes of scales. Float32, in which they are multiplied, represents each of them exactly.
_SCALES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
# With fewer inputs a row is one word, whether of 4 or of 8 bits.
_LEAST_INPUTS = 5


def compress_tensors(tensors: Mapping[str, np.ndarray], bits: Mapping[str, Bits]) -> dict[str, np.ndarray]:
    """The tensors to store; the ones named in `bits`, which are on their grids, in three parts each.

    Raises:
        ValueError: if a tensor is not on its grid, or its grid does not have 4 or 8 bits.
    """
    stored: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        if name.endswith(ENDINGS):
            raise ModelError(f"a tensor called {name} cannot be stored: {', '.join(ENDINGS)} are reserved endings")
        if name not in bits:
            stored[name] = tensor
            continue
        module, grid = name.removesuffix(WEIGHT), bits[name]
        if module == name or tensor.ndim != 2 or tensor.shape[1] < _LEAST_INPUTS:
            raise ValueError(
                f"{name} {list(tensor.shape)} cannot be stored in few bits: its name must end in {WEIGHT}, and it "
                f"needs two axes and at least {_LEAST_INPUTS} inputs"
            )
        try:
            grid.check(tensor.shape[1])
            multiples, scales = multiples_of(tensor, grid)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        stored[module + PACKED] = _pack(multiples, _num_bits(grid))
        # With float16 scales, compressed-tensors would compute scale times multiple in float16 and round it.
        stored[module + SCALE] = scales.astype(np.float32)
        stored[module + SHAPE] = np.array(tensor.shape, np.int64)
    return stored


def quantization_config(bits: Mapping[str, Bits], linears: Collection[str]) -> dict[str, Any]:
    """The field of this name in config.json for a folder in which the tensors named in `bits` are stored in few bits.

    Args:
        bits: the grid of each such tensor, the same for all.
        linears: names of all linear modules of the model in transformers, including the head.

    Raises:
        ValueError: if there is not exactly one grid, with 4 or 8 bits, or a tensor belongs to no linear module.
    """
    grids = {grid.name: grid for grid in bits.values()}
    if len(grids) != 1:
        raise ValueError(f"{METHOD} needs one grid for all layers, given {', '.join(sorted(grids)) or 'none'}")
    if strange := sorted(set(bits) - {module + WEIGHT for module in linears}):
        raise ValueError(f"{strange[0]} is the weight of no linear module, and only those are stored in few bits")
    (grid,) = grids.values()
    weights = {
        "num_bits": _num_bits(grid),
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if grid.group is None else "group",
        "group_size": grid.group,
        "dynamic": False,
    }
    # All linear modules except ignored ones; without its own format, the group could be mistaken for another one.
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": FORMAT,
    }
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [module for module in linears if module + WEIGHT not in bits],
        "kv_cache_scheme": None,
    }


class _Weights(BaseModel):
    """How the weights of a group of modules are stored: the fields that are read here."""

    num_bits: Literal[4, 8]
    type: Literal["int"]
    symmetric: Literal[True]
    strategy: Literal["group", "channel"]
    group_size: int | None = None
    dynamic: Literal[False] = False
    # Another order would permute the inputs.
    actorder: Literal["weight", "static", False] | None = None
    block_structure: None = None


class _Group(BaseModel):
    weights: _Weights
    input_activations: None = None
    output_activations: None = None
    format: Literal["pack-quantized"] | None = None


# How the package writes None.
_Nothing = Annotated[dict[str, Any], Field(max_length=0)] | None


class _Quantization(BaseModel):
    quant_method: Literal["compressed-tensors"]
    format: Literal["pack-quantized"]
    # Older versions of the package leave it at frozen.
    quantization_status: Literal["compressed", "frozen"]
    config_groups: dict[str, _Group] = Field(min_length=1, max_length=1)
    kv_cache_scheme: None = None
    sparsity_config: _Nothing = None
    transform_config: _Nothing = None


def read_quantization(config: Mapping[str, Any]) -> Bits | None:
    """The grid of a folder with this configuration; None if its weights are not stored in this form."""
    try:
        found = _Quantization.model_validate(config.get("quantization_config"), strict=True)
    except ValidationError:
        return None
    (group,) = found.config_groups.values()
    half, size = 2 ** (group.weights.num_bits - 1), group.weights.group_size
    if group.weights.strategy == "channel":
        return Bits(f"int{group.weights.num_bits}", -half, half - 1, None)
    if size is None or size < 1:
        return None
    return Bits(f"int{group.weights.num_bits}:{size}", -half, half - 1, size)


@dataclass(frozen=True)
class CompressedTensor(TensorInfo):
    """The place of a tensor of few bits, with its dense name and shape."""

    name: str
    packed: StoredTensor
    scale: StoredTensor
    num_bits: int

    def read(self) -> np.ndarray:
        pieces = list(self.pieces())
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def pieces(self) -> Iterator[np.ndarray]:
        outputs, inputs = self.shape
        step = max(1, safetensors.SLICE // (inputs * self.dtype.itemsize))
        for first in range(0, max(1, outputs), step):
            packed, scale = (_rows(part, first, step) for part in (self.packed, self.scale))
            dense = _unpack(packed, self.num_bits, inputs)
            groups = dense.reshape(*scale.shape, inputs // scale.shape[1])
            groups *= scale.astype(np.float32)[..., None]
            # No negative zeros, as from a negative scale.
            dense += 0
            yield dense


def join_parts(
    place: Path, stored: Mapping[str, StoredTensor], bits: Bits | None = None
) -> dict[str, StoredTensor | CompressedTensor]:
    """All tensors of a file or folder by dense name.

    Args:
        place: the file or folder, for messages.
        stored: its tensors as stored. The parts of a tensor may be in different files.
        bits: the grid of all; None accepts any grid of 4 or 8 bits.

    Raises:
        ModelError: listing every part that is missing, misshapen, of another dtype or not of the grid.
    """
    problems: list[str] = []
    tensors: dict[str, StoredTensor | CompressedTensor] = {}
    tensors |= {name: tensor for name, tensor in stored.items() if not name.endswith(ENDINGS)}
    modules = (name.removesuffix(ending) for name in stored for ending in ENDINGS if name.endswith(ending))
    for module in dict.fromkeys(modules):
        name, parts = module + WEIGHT, [module + ending for ending in ENDINGS]
        if name in stored:
            problems.append(f"{name} is stored dense and in few bits")
        elif lacking := [part for part in parts if part not in stored]:
            problems.append(f"missing: {', '.join(lacking)}")
        else:
            packed, scale, shape = (stored[part] for part in parts)
            joined = _join(module, packed, scale, shape, bits)
            if isinstance(joined, CompressedTensor):
                tensors[name] = joined
            else:
                problems += joined
    if problems:
        raise ModelError(
            f"{place} is corrupt ({len(problems)} problems); copy it again or write the model again:"
            + bulleted(problems)
        )
    return tensors


def _join(
    module: str, packed: StoredTensor, scale: StoredTensor, shape: StoredTensor, bits: Bits | None
) -> CompressedTensor | list[str]:
    """The tensor made of three parts, or what is wrong with them."""
    problems = []
    if packed.dtype != np.int32 or len(packed.shape) != 2:
        problems.append(f"{module}{PACKED} is {packed.dtype} {list(packed.shape)}, expected int32 with two axes")
    if scale.dtype not in _SCALES or len(scale.shape) != 2:
        kinds = ", ".join(map(str, _SCALES))
        problems.append(f"{module}{SCALE} is {scale.dtype} {list(scale.shape)}, expected two axes in one of {kinds}")
    if shape.dtype != np.int64 or shape.shape != (2,):
        problems.append(f"{module}{SHAPE} is {shape.dtype} {list(shape.shape)}, expected int64 [2]")
    if problems:
        return problems
    outputs, inputs = sizes = [int(size) for size in shape.read()]
    if outputs < 0 or inputs < _LEAST_INPUTS or not is_shape(sizes):
        return [f"{module}{SHAPE} holds {sizes}, expected outputs and at least {_LEAST_INPUTS} inputs"]
    widths, groups = {_width(inputs, num_bits): num_bits for num_bits in (4, 8)}, scale.shape[1]
    if packed.shape[0] != outputs or packed.shape[1] not in widths:
        expected = " or ".join(f"{[outputs, width]} for {num_bits} bits" for width, num_bits in widths.items())
        problems.append(f"{module}{PACKED} is {list(packed.shape)}, the shape {sizes} needs {expected}")
    if scale.shape[0] != outputs or not groups or inputs % groups:
        problems.append(f"{module}{SCALE} is {list(scale.shape)}, which does not divide the shape {sizes}")
    if problems:
        return problems
    num_bits = widths[packed.shape[1]]
    if bits is not None and (num_bits, groups * (bits.group or inputs)) != (_num_bits(bits), inputs):
        return [
            f"{module}{WEIGHT} has {num_bits} bits and a scale for each {inputs // groups} of {inputs} inputs, the "
            f"configuration says {bits.name}"
        ]
    return CompressedTensor((outputs, inputs), np.dtype(np.float32), module + WEIGHT, packed, scale, num_bits)


def _num_bits(bits: Bits) -> int:
    found = bits.high.bit_length() + 1
    if found not in (4, 8):
        raise ValueError(f"bits {bits.name!r} have {found} bits, {METHOD} is written with 4 or 8: take int4 or int8")
    return found


def _width(inputs: int, num_bits: int) -> int:
    """The words of a row."""
    return -(-inputs * num_bits // 32)


def _pack(multiples: Int[np.ndarray, "out in"], num_bits: int) -> Int[np.ndarray, "out words"]:
    outputs, inputs = multiples.shape
    places = np.zeros((outputs, _width(inputs, num_bits) * (32 // num_bits)), np.uint8)
    places[:, :inputs] = multiples.astype(np.int16) + 2 ** (num_bits - 1)
    octets = places[:, ::2] | places[:, 1::2] << 4 if num_bits == 4 else places
    return octets.view(np.int32)


def _unpack(packed: Int[np.ndarray, "out words"], num_bits: int, inputs: int) -> Float[np.ndarray, "out in"]:
    """The multiples, as float32."""
    places = packed.view(np.uint8)
    if num_bits == 4:
        places = np.stack((places & 15, places >> 4), axis=-1).reshape(len(packed), 8 * packed.shape[1])
    dense = places[:, :inputs].astype(np.float32)
    dense -= 2 ** (num_bits - 1)
    return dense


def _rows(tensor: StoredTensor, first: int, count: int) -> np.ndarray:
    """At most `count` rows of a matrix."""
    rows, columns = tensor.shape
    start = tensor.start + first * columns * tensor.dtype.itemsize
    return replace(tensor, start=start, shape=(min(count, rows - first), columns)).read()
