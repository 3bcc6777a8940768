"""The solver core, folder by folder from the lowest: base, operators, penalties, losses, problem, solvers.

Above them `solve` chooses a solver and checks, and `proximal` puts penalties into an optax chain.
"""
