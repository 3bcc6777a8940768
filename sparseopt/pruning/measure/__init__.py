"""What is measured on the dense model before any block is pruned, for what the recipe leaves open.

`survey` divides the zeros among the linears, `mixing` chooses the sizes of smaller models.
"""
