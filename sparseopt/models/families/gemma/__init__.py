"""The Gemma families. Each file exports its `Family`; `gemma2` has what they share."""
