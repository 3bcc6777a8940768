"""Experiments: typed configs, their tasks and data sets, the runner, plots and reports."""
