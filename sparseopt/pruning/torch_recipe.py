"""Floor 6: what a recipe may ask of a model whose blocks run in torch: nothing that takes gradients of Flax blocks."""

import dataclasses

from sparseopt.models import PrunableModel, TorchModel
from sparseopt.pruning.recipe import Recipe


def fitting_recipe(model: PrunableModel, recipe: Recipe) -> Recipe:
    """The recipe, what it leaves open filled in with what the model's blocks can do.

    In torch errors at outputs all count the same, and blocks are not trained.

    Raises:
        ValueError: naming all that the recipe asks for and torch blocks cannot do.
    """
    if not isinstance(model, TorchModel):
        return recipe
    problems = []
    if recipe.output_weights == "gradient":
        problems.append("output_weights='gradient' takes the gradient of the loss; leave it open or say 'uniform'")
    if recipe.allocation == "curves":
        problems.append("allocation='curves' takes the gradient of the loss; say 'uniform' or 'owl'")
    if recipe.reconstruct:
        problems.append("reconstruct trains the blocks by their gradients; leave it open or say 0")
    if recipe.weighting == "residual":
        problems.append("weighting='residual' takes linears that are known to write into the stream; say 'uniform'")
    if problems:
        raise ValueError(
            f"the recipe cannot be used on a {model.config.model_type} model, whose family is not known here and whose "
            "blocks run in torch:\n  " + "\n  ".join(problems)
        )
    return dataclasses.replace(recipe, output_weights="uniform", reconstruct=0)
