"""One algorithm per file. Each file holds a state and a solver for `sparseopt.core.problem.iterate.iterate`."""
