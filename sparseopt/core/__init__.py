"""The solver core, floors 0 to 4: types; thresholds; penalties and losses; solve; solvers."""
