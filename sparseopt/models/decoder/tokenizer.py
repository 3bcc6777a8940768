"""A model's tokenizer: text to token ids, the token (BOS) that every text begins with, and chats to text."""

from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer

from sparseopt.models.base.errors import ModelError, guarded
from sparseopt.models.files.folder import MAX_FILE, carried_files, file_in, read_json
from sparseopt.models.files.source import Source

#: Whether text begins with the tokenizer's BOS, always, never, or (auto) as the tokenizer itself does.
Bos = Literal["auto", "yes", "no"]
BOS_CHOICES: tuple[Bos, ...] = get_args(Bos)


def load_tokenizer(source: Source) -> Tokenizer:
    """Load the tokenizer of a model: from GGUF metadata or tokenizer.json, else as transformers converts it.

    Raises:
        ModelError: if no tokenizer can be read.
    """
    if (stored := source.stored_tokenizer()) is not None:
        return stored[0]
    file = file_in(source.path, "tokenizer.json", source.follow_links)
    if not file.is_file():
        what = f"{source.path} has no tokenizer.json and transformers cannot make one"
        advice = "; copy the model's tokenizer files into the folder"
        return guarded(lambda: _read_by_transformers(source).backend_tokenizer, what, advice)
    if file.stat().st_size > MAX_FILE:
        raise ModelError(f"{file} has more than {MAX_FILE:,} bytes, which no tokenizer needs; download it again")
    tokenizer = guarded(lambda: Tokenizer.from_file(str(file)), f"{file} is no valid tokenizer")
    # A saved tokenizer may truncate or pad every text.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_by_transformers(source: Source) -> Any:
    from transformers import AutoTokenizer

    carried_files(source.path, source.follow_links)
    # Without a False, transformers asks at the terminal whether to run code of the folder.
    return AutoTokenizer.from_pretrained(str(source.path), local_files_only=True, trust_remote_code=False)


def chat_writer(source: Source) -> Callable[[Sequence[Mapping[str, Any]]], str]:
    """A function that turns the messages of a chat into one text, with the model's own chat template.

    Messages have `role` and `content`, and other fields that the template knows, such as `tool_calls`; a content may
    also be None or a list of parts. The text contains the special tokens that the template writes.

    Raises:
        ModelError: if the model has no template; from the function, if the template rejects a chat or does not know its
            parts.
    """
    from transformers import PreTrainedTokenizerFast

    if (stored := source.stored_tokenizer()) is not None:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=stored[0], **stored[1])
    else:
        what = f"transformers cannot read the tokenizer of {source.path}"
        tokenizer = guarded(lambda: _read_by_transformers(source), what)
    if tokenizer.chat_template is None:
        raise ModelError(
            f"{source.name} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json), by "
            "which messages become text; name a column of texts, or copy the template into the model's folder"
        )

    def write(messages: Sequence[Mapping[str, Any]]) -> str:
        written = guarded(
            lambda: str(tokenizer.apply_chat_template([dict(each) for each in messages], tokenize=False)),
            f"the chat template of {source.name} rejects the chat {repr(messages)[:200]}",
            "; leave this chat out",
        )
        contents = [each.get("content") for each in messages]
        if any(str(content) in written for content in contents if isinstance(content, list)):
            raise ModelError(
                f"the chat template of {source.name} writes a list of parts as it is given, since it knows texts only: "
                f"{repr(messages)[:200]}; make one text of the parts, or leave this chat out"
            )
        return written

    return write


def encode_text(tokenizer: Tokenizer, text: str) -> Int[np.ndarray, " tokens"]:
    """The token ids of a text, int32, without special tokens at its ends."""
    # Alone, `encode` would keep every other thread waiting, for minutes of a long text.
    return np.asarray(tokenizer.encode_batch([text], add_special_tokens=False)[0].ids, np.int32)


def start_token(source: Source, tokenizer: Tokenizer, bos: Bos = "auto") -> int | None:
    """The id of the BOS token that texts begin with; None for none.

    "auto" follows the model's own tokenizer: `add_bos_token` in tokenizer_config.json if given, else whether the
    tokenizer adds one, which for a GGUF file is `tokenizer.ggml.add_bos_token`.

    Raises:
        ModelError: for "yes" if the tokenizer has no BOS.
    """
    if bos not in BOS_CHOICES:
        raise ModelError(f"bos must be one of {', '.join(BOS_CHOICES)}, given {bos!r}")
    if bos == "no":
        return None
    file = file_in(source.path, "tokenizer_config.json", source.follow_links)
    # A GGUF file has no such file beside it.
    settings = read_json(file) if file.is_file() else {}
    token = guarded(lambda: tokenizer.encode("a"), f"{source.path} has a tokenizer that cannot encode")
    marked = zip(token.ids, token.special_tokens_mask, strict=True)
    front = [number for number, _ in takewhile(lambda each: each[1], marked)]
    # Several leading tokens are a prompt template, not a BOS.
    start = front[0] if len(front) == 1 else _named_bos(settings, source.config, tokenizer)
    if bos == "yes":
        if start is None:
            raise ModelError(
                f"the tokenizer of {source.name} has no BOS token (bos_token in tokenizer_config.json, or bos_token_id "
                "in the model's configuration); bos must be auto or no"
            )
        return start
    asked = settings.get("add_bos_token")
    adds = asked if asked is True or asked is False else front == [start]
    return start if adds else None


def _named_bos(settings: dict[str, Any], config: dict[str, Any], tokenizer: Tokenizer) -> int | None:
    """The id of the BOS token named in the tokenizer's settings, or else in the model's configuration."""
    if "bos_token" not in settings:
        number = config.get("bos_token_id")
        return number if type(number) is int and tokenizer.id_to_token(number) is not None else None
    named = settings["bos_token"]
    text = named.get("content") if isinstance(named, dict) else named
    return tokenizer.token_to_id(text) if isinstance(text, str) else None
