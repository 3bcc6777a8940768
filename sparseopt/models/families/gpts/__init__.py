"""OPT, GPT-2 and GPT-NeoX: layer norms, biases, an MLP without gate. Each file hands out its `Family`."""
