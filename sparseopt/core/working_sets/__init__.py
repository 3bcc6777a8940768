"""Working sets for sparse regression: the columns, the terms of entries, steps on few columns, rounds, the solver.

All but the steps is NumPy on the host; `working_set` has the solver, and its form under `jit`.
"""
