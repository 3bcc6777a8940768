"""Bad inputs by kind, each with the expected error. A benchmark counts how many raise it."""

from typing import NamedTuple

from sparseopt.experiments.config import ConfigError
from sparseopt.experiments.read.files import FileError
from sparseopt.models import ModelError
from sparseopt.pruning.text.chats import TextError
from tests.fuzz.bad_configs import DOTTED, YAML
from tests.fuzz.bad_files import NUMPY, PICTURES, TABLES, TEXTS
from tests.fuzz.bad_models import CONFIG, GGUF, INDEX, SAFETENSORS, TOKENIZERS
from tests.fuzz.making import Make

# Seconds of CPU time, which other processes do not lengthen: an input that takes longer is an error.
SLOW = 5.0


class BadInput(NamedTuple):
    """A bad input: what kind, what is wrong, what makes the call, the documented class, a part of the message."""

    kind: str
    name: str
    make: Make
    error: type[Exception]
    text: str  # or a pattern


BAD_INPUTS: list[BadInput] = [
    BadInput(kind, name, make, error, text)
    for kind, error, cases in (
        ("safetensors", ModelError, SAFETENSORS),
        ("config.json", ModelError, CONFIG),
        ("index", ModelError, INDEX),
        ("GGUF", ModelError, GGUF),
        ("tokenizer", ModelError, TOKENIZERS),
        ("YAML", ConfigError, YAML),
        ("dotted path", ConfigError, DOTTED),
        ("picture", FileError, PICTURES),
        ("numpy file", FileError, NUMPY),
        ("graph or signal file", FileError, TABLES),
        ("calibration text", TextError, TEXTS),
    )
    for name, make, text in cases
]
