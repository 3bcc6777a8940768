"""Reading GGUF files as Hugging Face models, and writing them.

`reader` has the `GGUFSource` that reads a file, `architectures` the names and layouts of both formats, `writer` the
metadata and the file to write.
"""
