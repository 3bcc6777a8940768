"""A model with an architecture that only transformers knows, whole in memory as a torch module (extra `torch`).

It is opened as an outline, the module without values, which has the names and shapes; tensors are read from the source
when the module is needed. Code that comes with a model is never run.
"""

import copy
import re
from collections import Counter
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from sparseopt.core.base.types import Observer
from sparseopt.models.base.errors import ModelError, bulleted, guarded
from sparseopt.models.base.fields import refuse_unless
from sparseopt.models.base.rope import max_positions
from sparseopt.models.families import FAMILIES
from sparseopt.models.files.in_memory import MemorySource
from sparseopt.models.files.source import Source
from sparseopt.models.streaming.prunable import PrunableModel, check_count
from sparseopt.models.streaming.streamed import ModelSource, is_known, open_model, source_of

# Names inside a numbered block, such as `model.layers.3.mlp.up_proj`.
_IN_BLOCK = re.compile(r".*\.\d+\..")


class LoadedModel(PrunableModel):
    """A model that transformers loads; its layers are torch's `Linear` and transformers' `Conv1D` in the blocks.

    Attributes:
        linears: names of the linear layers in the module, by the checkpoint names of their weights.
        other_weights: number of weights in other matrices of the blocks, such as experts in one stack.
    """

    packages = ("torch", "transformers")

    def __init__(self, source: Source) -> None:
        """Build the outline and find the linear layers; a `ModelError` says why that is not possible."""
        self.source = source
        made = f"transformers makes no causal language model of the configuration in {source.path}"
        self._outline, self.config = guarded(lambda: _outline(source), made, advice="")
        from torch.nn import Linear
        from transformers.core_model_loading import revert_weight_conversion
        from transformers.pytorch_utils import Conv1D

        state = self._outline.state_dict()
        names = {id(tensor): name for name, tensor in state.items()}
        stored = revert_weight_conversion(self._outline, dict(state))
        keys = {names[id(tensor)]: self._key(key) for key, tensor in stored.items() if id(tensor) in names}
        parts = {name: part for name, part in self._outline.named_modules() if isinstance(part, Linear | Conv1D)}
        found = {f"{name}.weight": part for name, part in parts.items() if _IN_BLOCK.match(name)}
        if not found:
            raise ModelError(f"the blocks of a {self.config.model_type} model have no linear layers: nothing to prune")
        self._check([f"missing: {name}" for name in found if keys.get(name) not in source.tensors])
        self.linears = {keys[name]: name.removesuffix(".weight") for name in found}
        self._transposed = {keys[name] for name, part in found.items() if isinstance(part, Conv1D)}
        others = {name: each for name, each in self._outline.named_parameters() if name not in found and each.ndim > 1}
        self.other_weights = sum(each.numel() for name, each in others.items() if _IN_BLOCK.match(name))

    def linear_keys(self) -> list[str]:
        return list(self.linears)

    def is_transposed(self, key: str) -> bool:
        return key in self._transposed

    @cached_property
    def module(self) -> Any:
        """The module with its values, read now, in the most common dtype among them; see `forget`."""
        import torch

        def load() -> Any:
            tensors, sizes = {key: _to_torch(self.source.read(key)) for key in self.source.tensors}, Counter[Any]()
            for tensor in tensors.values():
                sizes[tensor.dtype] += tensor.nbytes if tensor.is_floating_point() else 0
            return type(self._outline).from_pretrained(
                None, config=self._outline.config, state_dict=tensors, dtype=sizes.most_common(1)[0][0],
                ignore_mismatched_sizes=True, output_loading_info=True,
            )  # fmt: skip

        module, info = guarded(load, f"transformers cannot load {self.source.path}")
        wrong = [f"{key} is {list(shape)}, expected {list(own)}" for key, shape, own in info["mismatched_keys"]]
        self._check([f"missing: {name}" for name in info["missing_keys"]] + [f"misshapen: {text}" for text in wrong])
        device = jax.devices()[0]
        shared = device.platform == "gpu" and torch.cuda.is_available()
        return module.to(torch.device("cuda", device.local_hardware_id) if shared else "cpu")

    def forget(self) -> None:
        """Free the module; the next use reads it again."""
        vars(self).pop("module", None)

    @property
    def nbytes(self) -> int:
        """Size of the module."""
        return sum(info.nbytes for info in self.source.tensors.values())

    def ids(self, tokens: Int[np.ndarray, "B T"]) -> Any:
        """Token ids as the module reads them."""
        import torch

        return torch.as_tensor(np.asarray(tokens, np.int64), device=self.module.device)

    def loss(self, tokens_T: Int[np.ndarray, "T"], skipped: int) -> float:
        """`- sum_t log p(tokens[t + 1])` of a window, without the first `skipped` predictions."""
        import torch

        ids = self.ids(tokens_T)
        with torch.no_grad():
            logits = self.module(input_ids=ids[None], use_cache=False).logits[0, skipped:-1].float()
        return float(torch.nn.functional.cross_entropy(logits, ids[1 + skipped :], reduction="sum"))

    def draw(
        self, count: int, length: int, start: int, *, seed: int, observer: Observer
    ) -> Int[np.ndarray, "count length"]:
        """Texts drawn from the model at temperature 1, `length` tokens each after the token `start`."""
        import torch

        begin = self.ids(np.full((count, 1), start))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            found = self.module.generate(
                begin, attention_mask=torch.ones_like(begin), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                min_new_tokens=length, max_new_tokens=length, pad_token_id=start,
            )  # fmt: skip
        observer("tokens of each text", length, length)
        return found[:, 1:].cpu().numpy().astype(np.int32)

    def _key(self, key: str) -> str:
        """The name of a tensor in this checkpoint; some checkpoints omit the first part."""
        short = key.removeprefix(f"{self._outline.base_model_prefix}.")
        return short if key not in self.source.tensors and short in self.source.tensors else key

    def _check(self, problems: list[str]) -> None:
        if problems:
            raise ModelError(
                f"{self.source.path} does not hold the {self.config.model_type} model that transformers makes of its "
                "configuration; check that configuration and weights belong together:" + bulleted(sorted(problems))
            )


def open_any(source: ModelSource) -> PrunableModel:
    """`open_model`, or a `LoadedModel` if the family is not known here; raises the errors of both."""
    if isinstance(source, PrunableModel):
        return source
    opened = source_of(source)
    return open_model(opened) if is_known(opened) or isinstance(opened, MemorySource) else LoadedModel(opened)


def _outline(source: Source) -> tuple[Any, Any]:
    """The module without values, and its sizes as in a `DecoderConfig`."""
    config, model_type = source.config, source.config["model_type"]
    unknown = f"unknown model_type {model_type!r}; known are {', '.join(sorted(FAMILIES))}"
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ModelError(
            f"{unknown}. Other architectures are loaded by transformers in torch, and {error.name} is not installed: "
            "pip install 'sparseopt[torch]'"
        ) from error
    refuse_unless(config, {"quantization_config": (None,), "is_encoder_decoder": (False,)})
    if model_type not in transformers.CONFIG_MAPPING:
        raise ModelError(
            f"{unknown}, and what transformers has, but its version {transformers.__version__} does not have this one "
            "either. Code beside the weights is never run (trust_remote_code)"
        )
    read = transformers.CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(dict(config)))
    sizes = read.get_text_config()
    check_count(source, sizes.num_hidden_layers, "blocks")
    with torch.device("meta"):
        module = transformers.AutoModelForCausalLM.from_config(read, trust_remote_code=False)
    # By attribute: transformers has one name for fields that have several names in configurations.
    found = {name: getattr(sizes, name, None) for name in ("max_position_embeddings", "rope_parameters")}
    return module, SimpleNamespace(
        model_type=model_type, vocab_size=sizes.vocab_size, hidden_size=sizes.hidden_size,
        num_layers=sizes.num_hidden_layers, max_positions=max_positions(found),
    )  # fmt: skip


def _to_torch(value: np.ndarray) -> Any:
    """A torch tensor in the same memory."""
    import torch

    exact = value.dtype.name != "bfloat16"
    return torch.from_numpy(value) if exact else torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
