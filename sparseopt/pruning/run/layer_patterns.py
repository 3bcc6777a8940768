"""Which weights of each layer may survive under a recipe: fractions of zeros, and the patterns that they make."""

from collections.abc import Mapping

from sparseopt.layers.patterns import Pattern, implied_sparsity, parse_pattern
from sparseopt.layers.problem import LayerMethod, check_method, reads_variances
from sparseopt.models import PrunableModel
from sparseopt.pruning.recipe.prune_recipe import Recipe
from sparseopt.pruning.recipe.targets import chosen_linears


def layer_shares(model: PrunableModel, recipe: Recipe) -> dict[str, float]:
    """The fraction of zeros of every pruned layer, in the model's order, by the key of its weight.

    Raises:
        ValueError: if names or expressions in the recipe match no layer, or leave none.
    """
    keys = model.linear_keys()
    owners = {key.rpartition(".")[0] for key in model.exported_keys()}
    names = [key.removesuffix(".weight") for key in keys]
    chosen = chosen_linears(names, sorted(owners.difference(names)), recipe.targets, recipe.ignore)
    implied = implied_sparsity(recipe.pattern)
    share = recipe.sparsity if implied is None else implied
    return {f"{name}.weight": share if own is None else own for name, own in chosen.items()}


def layer_patterns(
    model: PrunableModel, recipe: Recipe, method: LayerMethod, shares: Mapping[str, float]
) -> dict[str, Pattern]:
    """The pattern of each layer that has a fraction of zeros, by the key of its weight.

    Raises:
        ValueError: naming the layer, if the pattern is impossible there or the method does not support it.
    """
    patterns: dict[str, Pattern] = {}
    checked: set[tuple[int, ...]] = set()
    for key, share in shares.items():
        shape = model.weight_shape(key)
        try:
            patterns[key] = parse_pattern(recipe.pattern, share, shape)
            if shape not in checked:
                check_method(method, patterns[key], shape, reads_variances(method), recipe.has_support)
        except ValueError as error:
            raise ValueError(f"{key.removesuffix('.weight')}: {error}") from error
        checked.add(shape)
    return patterns
