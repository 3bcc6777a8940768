"""A decoder-only language model in Flax NNX: its settings, layers, attention and experts, its tokenizer, and writing.

`decoder` has the modules (`Embedding`, `Block`, `Head`, `Decoder`), `settings` the `DecoderConfig` that shapes them.
"""
