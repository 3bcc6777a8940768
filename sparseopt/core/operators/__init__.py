"""Linear maps with `mv` and `rmv`: matrices, the differences of grids and graphs, their tables of rows.

`maps` has the protocol; `normal_solves` solves for a sum of weights and a map's normal matrix.
"""
