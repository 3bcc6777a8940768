"""What to do to a model: `Recipe` and `ShrinkRecipe`, on what both say (`pass_recipe`).

`options` describes their fields, `effort` their defaults, `targets` and `allocation` which linears lose how much.
"""
