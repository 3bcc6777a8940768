"""Losses: the quadratic, losses of single observations, and losses of data with a matrix or at the nodes of a graph."""
