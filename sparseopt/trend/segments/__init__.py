"""The jumps of a series: exact segmentations of chains, lines that meet at bends, and the choice among them.

`so.trend.jumps` finds and reports them; `optimal_jumps` is the exact answer to a price per jump.
"""
