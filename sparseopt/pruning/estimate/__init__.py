"""What a run will take, from shapes alone: `cost` of time, memory and disk, `footprint` within a budget of memory.

`inspection` says it of a source before anything is loaded.
"""
