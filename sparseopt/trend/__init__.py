"""Trend filtering of signals on graphs, with a certificate."""
