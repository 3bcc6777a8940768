"""The foundations of models: the error class, checked fields of a configuration, rotary frequencies.

All of it is plain Python, NumPy and pydantic.
"""
