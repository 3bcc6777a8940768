"""GGUF files read as Hugging Face models: header, names and layouts by architecture, tokenizer.

`source` has the `GGUFSource` that puts them together.
"""
