"""Reading GGUF files as Hugging Face models, and writing them.

`source` has the `GGUFSource` that reads a file, `architectures` the names and layouts of both formats, `metadata` the
metadata of a file to write.
"""
