"""Training of the weights that are kept: of one block (`reconstruction`), of the whole model (`distillation`).

`training` is what both share: settings, one update, the loop, the choice of the state.
"""
