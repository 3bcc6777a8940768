"""Measurements on the dense model, before any block is pruned, that decide what the recipe leaves open.

`survey` divides the zeros among the layers, `mixing` chooses the sizes of smaller models.
"""
