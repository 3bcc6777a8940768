"""What the room stands on: the error of models, fields of a configuration, and rotary frequencies in plain NumPy."""
