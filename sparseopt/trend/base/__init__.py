"""What every fit starts from: a graph and its geometry, the checked request, and what is read off a fit.

`Graph`, `TrendSolution`, and for the methods `Fit`, `Geometry` and `Ground`.
"""
