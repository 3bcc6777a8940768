"""The run of a recipe: its plan for a model, its windows, its fingerprint, and one block pruned, written and told.

`plan` checks all of it before any work, `block` prunes, `shared_pass` stores, `resumption` says what is done,
`facts` and `card` describe.
"""
