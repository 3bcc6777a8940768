"""Reading and writing model files: safetensors, folders, names on the hub, GGUF.

`source` opens any of them as a `Source`: a configuration and tensors by their Hugging Face names.
"""
