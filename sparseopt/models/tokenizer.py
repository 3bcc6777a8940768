"""Floor 5: a model's tokenizer, and text to token ids."""

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer

from sparseopt.models.errors import ModelError
from sparseopt.models.folder import MAX_FILE, carried_files, file_in
from sparseopt.models.gguf_source import GGUFSource
from sparseopt.models.panics import guarded
from sparseopt.models.source import Source


def load_tokenizer(source: Source) -> Tokenizer:
    """The tokenizer of a model: from GGUF metadata or tokenizer.json, else as transformers converts it.

    Raises:
        ModelError: if there is none that can be read.
    """
    if isinstance(source, GGUFSource):
        return source.tokenizer()
    file = file_in(source.path, "tokenizer.json")
    if not file.is_file():
        return _convert_slow(source)
    if file.stat().st_size > MAX_FILE:
        raise ModelError(f"{file} has more than {MAX_FILE:,} bytes, which no tokenizer needs; download it again")
    tokenizer = guarded(lambda: Tokenizer.from_file(str(file)), f"{file} is no valid tokenizer")
    # A saved tokenizer may cut or pad every text; whole texts are wanted here.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _convert_slow(source: Source) -> Tokenizer:
    from transformers import AutoTokenizer

    carried_files(source.path)
    try:
        # Said outright: without it, transformers asks at the terminal whether to run code of the folder.
        return AutoTokenizer.from_pretrained(
            str(source.path), local_files_only=True, trust_remote_code=False
        ).backend_tokenizer
    except Exception as error:  # transformers raises whatever its converters do
        raise ModelError(
            f"{source.path} has no tokenizer.json and transformers cannot make one ({type(error).__name__}); "
            "copy the model's tokenizer files into the folder"
        ) from error


def encode_text(tokenizer: Tokenizer, text: str) -> Int[np.ndarray, " tokens"]:
    """The token ids of a text, int32, without special tokens at its ends."""
    return np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
