"""The Cohere families. Each file exports its `Family`; `cohere` has what they share."""
