"""Floor 5: the one error class of model input and output."""


class ModelError(ValueError):
    """A model that cannot be read, run or written; says what was given, what was expected, what to do."""
