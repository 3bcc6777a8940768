"""The Gemma families. Each file hands out its `Family`; `gemma2` has what they have in common."""
