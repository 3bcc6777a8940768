"""The lowest floor: pytrees and types, checks of arguments, thresholds, dense products, a line of devices."""
