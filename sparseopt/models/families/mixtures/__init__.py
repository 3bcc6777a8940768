"""Families whose blocks are mixtures of experts. Each file exports its `Family`."""
