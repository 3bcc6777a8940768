"""Floor 7: experiments: typed configs, their tasks and data sets, the runner, plots and reports."""
