"""Floor 4: one algorithm a file. Each file holds a state and a solver for `sparseopt.core.iterate.iterate`."""
