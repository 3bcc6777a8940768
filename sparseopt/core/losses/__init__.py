"""Losses: the quadratic, losses of single observations, and those of data with a matrix or at the nodes of a graph."""
