"""The run of a recipe: its plan for a model, its windows, its fingerprint, and the pruning of each block.

`plan` checks everything before any work, `block` prunes, `folder_pass` stores, `resumption` knows what is finished,
`facts` and `card` describe the result.
"""
