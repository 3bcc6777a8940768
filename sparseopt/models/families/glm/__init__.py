"""The GLM families. Each file hands out its `Family`; `glm` has what they have in common."""
