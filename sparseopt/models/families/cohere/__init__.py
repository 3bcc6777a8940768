"""The Cohere families. Each file hands out its `Family`; `cohere` has what they have in common."""
