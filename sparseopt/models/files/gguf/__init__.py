"""GGUF files read as Hugging Face models, and what is needed to write one.

`source` has the `GGUFSource` that reads a file, `architectures` the names and layouts of both, `metadata` the metadata
of a file to be written.
"""
