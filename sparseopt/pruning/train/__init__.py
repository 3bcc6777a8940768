"""Training of the kept weights: of one block (`reconstruction`), or of the whole model (`distillation`).

`training` has what both share: settings, one update, the loop, the choice of the state.
"""
