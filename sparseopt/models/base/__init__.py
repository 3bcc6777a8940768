"""What the room stands on: its error, checked fields of a configuration, rotary frequencies.

All of it is plain Python, NumPy and pydantic.
"""
