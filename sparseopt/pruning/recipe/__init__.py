"""What to do to a model: `Recipe` and `ShrinkRecipe`, on what both share (`pass_recipe`).

`options` describes their fields, `effort` their defaults; `targets` and `allocation` say how much each layer loses.
"""
