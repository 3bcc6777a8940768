"""The form in which a run stores its model, and which layers are on a grid of few bits: decided before any work.

    output ends in .gguf    one GGUF file, with its run in a folder beside it, whose name ends in .gguf.run
    bits int8, int4         a folder in the form of compressed-tensors
    else                    a folder of safetensors

Bits of GGUF files are only for such files, and the others only for folders.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TypeVar

from sparseopt.layers.bits import BITS, Bits, parse_bits
from sparseopt.models import Compressed, Form, Joined, ModelError, Source, StreamedModel
from sparseopt.models.files.gguf.header import GGUFTensor
from sparseopt.models.files.gguf.reader import GGUFSource
from sparseopt.models.files.gguf.writer import KINDS, SAME_WIDTH
from sparseopt.pruning.recipe.pass_recipe import PassRecipe
from sparseopt.pruning.recipe.prune_recipe import Recipe

ENDING = ".gguf"
# Bits of embedding and head, if layers have fewer bits.
OUTER_BITS = "q8_0"

T = TypeVar("T", bound=PassRecipe)


def is_file(output: Path) -> bool:
    """Whether a model is written as one file."""
    return output.suffix.lower() == ENDING


def run_folder_of(output: Path) -> Path:
    """The folder of the run that writes an output."""
    return output.with_name(f"{output.name}.run") if is_file(output) else output


def output_of(recipe: PassRecipe, folder: Path, name: str) -> Path:
    """An output in a folder that fits the recipe: a file if its bits are for GGUF files."""
    return folder / (name + ENDING if recipe.bits in KINDS or recipe.head_bits is not None else name)


def chosen_form(
    model: StreamedModel,
    target: StreamedModel,
    stays: Sequence[int],
    recipe: PassRecipe,
    output: Path,
    targeted: Collection[str] | None,
) -> Form:
    """The form of a run's output.

    Args:
        model: the dense model.
        target: the model that is written.
        stays: the blocks of the model that the target keeps.
        recipe: checked.
        output: the folder or file.
        targeted: the keys of the weights that the recipe is for, in the dense model; None for all layers.

    Raises:
        ValueError: if this output cannot have these bits, or their groups tile no layer.
        ModelError: if GGUF has no name for the family.
    """
    asked, file = None if recipe.bits is None else parse_bits(recipe.bits), is_file(output)
    if asked and file != (asked.name in KINDS):
        where = "in a folder: leave .gguf out of the output, or give q8_0, q5_0 or q4_0"
        if not file:
            where = "in a GGUF file: give an output that ends in .gguf, or int8 or int4 for a folder"
        raise ValueError(f"bits {asked.name!r} are stored {where}")
    if recipe.head_bits is not None and not file:
        raise ValueError("head_bits are stored in a GGUF file: give an output that ends in .gguf, or leave them out")
    bits: dict[str, Bits] = {}
    for place, index in enumerate(stays):
        for name in target.block_linears(place):
            dense, key = model.weight_key(index, name), target.weight_key(place, name)
            chosen = targeted is None or dense in targeted
            same = file and not recipe.get("only_vocabulary")
            own = (asked if chosen else None) if asked else _same_width(model, dense, chosen) if same else None
            if own is not None and target.weight_shape(key)[1] % (own.group or 1) == 0:
                bits[key] = own
    if asked and not bits:
        widths = sorted({target.weight_shape(key)[1] for key in target.linear_keys()})
        raise ValueError(
            f"bits {asked.name!r} have a scale for each {asked.group} inputs, which tile no layer of this model, of "
            f"{', '.join(map(str, widths))} inputs: take int8, or int4:group with a divisor"
        )
    if file:
        outer = _outer_bits(model, recipe)
        form = Joined(bits, file=output, source=model.source, model_config=target.source.config, outer_bits=outer)
        form.check(target.exported_keys())
        return form
    if bits:
        if any(target.is_transposed(key) for key in bits):
            raise ModelError(
                f"bits {recipe.bits!r} are stored in a folder for weights [out, in], and a "
                f"{target.source.config.get('model_type')} model stores [in, out]: leave bits out"
            )
        return Compressed(bits)
    return Form()


def _same_width(model: StreamedModel, key: str, chosen: bool) -> Bits | None:
    """The grid without an offset that has as many bits as a GGUF file's tensor; None for floats.

    Raises:
        ModelError: if a chosen tensor has another type.
    """
    info = model.source.tensors[key]
    name = SAME_WIDTH.get(info.kind) if isinstance(info, GGUFTensor) else None
    if isinstance(info, GGUFTensor) and info.quantised and name is None and chosen:
        raise ModelError(f"{key} has the type {info.kind.name}, and no grid without an offset is as wide: give bits")
    return None if name is None else BITS[name]


def _outer_bits(model: StreamedModel, recipe: PassRecipe) -> Bits | None:
    """The grid of embedding and head: as given, else `OUTER_BITS` for floats if layers have few bits."""
    if recipe.head_bits is not None:
        return BITS[recipe.head_bits]
    infos = [model.source.tensors[key] for key in model.outer_keys()]
    quantised = any(isinstance(info, GGUFTensor) and info.quantised for info in infos)
    return BITS[OUTER_BITS] if recipe.bits is not None and not quantised else None


def with_dtype(source: Source, recipe: T) -> T:
    """The recipe with a dtype for a quantised source, which float32 would make far larger."""
    quantised = isinstance(source, GGUFSource) and any(tensor.quantised for tensor in source.tensors.values())
    return recipe.model_copy(update={"dtype": "bfloat16"}) if quantised and recipe.dtype is None else recipe


def without_distillation(recipe: T, form: Form) -> T:
    """The recipe without training of the whole model if layers are on a grid, which training would leave."""
    if not form.bits or recipe.distillation is None:
        return recipe
    if recipe.given("distil_epochs"):
        raise ValueError(
            "distil_epochs trains the whole model after its layers were put on grids of few bits, which they would "
            "leave: leave distil_epochs or bits out"
        )
    return recipe.model_copy(update={"distil_epochs": 0})


def without_survey(recipe: Recipe) -> Recipe:
    """The recipe of a run without zeros: an allocation distributes zeros, and each output has grids of its own."""
    for name, what in (("allocation", "distributes zeros"), ("output_weights", "compares the outputs that have zeros")):
        if (value := recipe.get(name)) != "uniform" and recipe.given(name):
            raise ValueError(f"{name} {value!r} {what}, and none are asked for: leave it out")
    return recipe.model_copy(update={"allocation": "uniform", "output_weights": "uniform"})
