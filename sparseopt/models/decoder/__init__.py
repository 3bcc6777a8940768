"""A decoder-only language model in Flax NNX: its layers, attention, experts and tokenizer.

`decoder` has its modules, `settings` the `DecoderConfig` that shapes them, `cached_decoding` generates text.
"""
