"""What every fit starts from: the graph, the signal on it, the checked job, and what is read off a fit.

`Graph`, `TrendSolution`, and for the methods `Job`, `Ground` and `Layout`.
"""
