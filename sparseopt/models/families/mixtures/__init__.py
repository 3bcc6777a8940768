"""Families whose blocks are mixtures of experts. Each file hands out its `Family`."""
