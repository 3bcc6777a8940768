"""The run of a recipe: its plan for a model, its windows, its folder, and one block pruned, written and told.

`plan` checks all of it before any work, `block` prunes, `shared_pass` stores, `folder` resumes,
`facts` and `card` describe.
"""
