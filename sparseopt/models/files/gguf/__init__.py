"""GGUF files, read as Hugging Face models: header, tensor names and layouts of each architecture, tokenizer.

`source` has the `GGUFSource` that puts them together.
"""
