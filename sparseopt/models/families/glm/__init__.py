"""The GLM families. Each file exports its `Family`; `glm` has what they share."""
