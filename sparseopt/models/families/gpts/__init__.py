"""OPT, GPT-2 and GPT-NeoX: layer norms, biases, an MLP without gate. Each file exports its `Family`."""
