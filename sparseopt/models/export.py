"""Export of a model, one safetensors shard at a time, as a folder that transformers loads.

Every file is written under a temporary name, forced to disk and renamed: a file under its final name is whole.
"""

import contextlib
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparseopt.models.base.errors import ModelError, listed
from sparseopt.models.files.forms import Form, Joined, Readable
from sparseopt.models.files.safetensors import WRITABLE, TensorInfo, UnreadTensor, read_header
from sparseopt.models.files.source import Source
from sparseopt.system.files import replacing

#: The tag of the shard with all tensors outside the blocks.
OUTER_TAG = "outer"
#: The tag of a shard that has all tensors.
WHOLE_TAG = "whole"


def block_tag(index: int) -> str:
    """The tag of a block's shard."""
    return f"block-{index:04d}"


def trained_tag(index: int) -> str:
    """The tag of the shard that replaces a block's after training of the whole model."""
    return f"trained-{index:04d}"


def check_output(source: Source, output: Path) -> None:
    """Raise a `ModelError` if an output folder is inside the source's folder, which should hold one model only."""
    if source.path.resolve() in output.expanduser().resolve().parents:
        raise ModelError(
            f"the output folder {output} lies in the model's folder {source.path}, which would then hold two models; "
            "choose another"
        )


def unread(source: Source, keys: Iterable[str]) -> dict[str, UnreadTensor]:
    """Tensors of a source, each of which is read when it is written."""
    infos = source.tensors
    return {
        key: UnreadTensor(infos[key].shape, infos[key].dtype, partial(source.pieces, key), infos[key]) for key in keys
    }


class ShardedWriter:
    """Writes a changed copy of a source: `write` for each shard, then `finish`.

    Attributes:
        output: the folder.
        files: the source's files by name, besides configuration and weights.
    """

    def __init__(
        self,
        output: str | Path,
        source: Source,
        dtype: Any = None,
        form: Form | None = None,
        keys: Collection[str] | None = None,
        keep: Collection[str] | None = None,
        writes: bool = True,
    ) -> None:
        """Make the output folder.

        Args:
            output: a folder that is empty or does not exist.
            source: the original model; provides names, shapes, dtypes and the other files.
            dtype: dtype of all float tensors written; None keeps each tensor's own (float32 if it was quantised).
            form: how tensors are stored; None for safetensors.
            keys: names of the tensors that the folder must hold; default: all of the source.
            keep: tags of shards that an earlier writer finished in the folder, which may then also hold other files;
                None requires an empty folder.
            writes: False keeps the same records but writes nothing, for the other processes of a distributed run.

        Raises:
            ModelError: if the folder cannot be used, its disk has too little space, or a file cannot be copied.
        """
        self.output = Path(output).expanduser()
        self._stored: dict[str, int] = {}  # bytes by shard
        self._replaced: list[str] = []
        self._source = source
        self._form, self._writes = form or Form(), writes
        self._dtype = None if dtype is None else _writable(dtype)
        self._expected = {key: info.shape for key, info in source.tensors.items() if keys is None or key in keys}
        self._places: dict[str, str] = {}
        # Read now, so that a file that cannot be copied is an error before any work.
        self.files = source.sidecars() if writes else {}
        if writes:
            self._prepare(keep)
        for tag in keep or ():
            self._adopt(self._form.file_name(tag))

    @property
    def shards(self) -> list[str]:
        """Names of the finished shard files, in order of writing."""
        return list(self._stored)

    @property
    def dense_bytes(self) -> int:
        """Size of all tensors written so far, in the dtypes written."""
        return sum(map(self._nbytes, self._places))

    @property
    def stored_bytes(self) -> int:
        """Size of the same tensors as stored."""
        return sum(self._stored.values())

    def dtype_of(self, key: str) -> np.dtype:
        own = self._source.tensors[key].dtype
        # In float32 a multiple of a scale is exact.
        if key in self._form.bits:
            return np.dtype(np.float32)
        return self._dtype if self._dtype is not None and jnp.issubdtype(own, jnp.floating) else own

    def write(self, tag: str, tensors: Mapping[str, np.ndarray | UnreadTensor], instead: str | None = None) -> str:
        """Write one shard and return its file name. The shard is then safe on disk.

        The tag names the shard: letters, digits and hyphens, new to this writer. Tensors are given by checkpoint name,
        in any float dtype; an `UnreadTensor` is read when it is written. `instead` is the tag of a
        finished shard with the same tensors, which this one replaces; its file stays until `finish`.

        Raises:
            ModelError: if a name, shape or value cannot be written.
            DiskError: if writing fails, naming the failed shard and the shards that are safe.
        """
        name = self._form.file_name(tag)
        if not re.fullmatch(r"[A-Za-z0-9-]+", tag) or name in self.shards:
            raise ModelError(f"shard tag {tag!r} is taken or not made of letters, digits and hyphens")
        replaced = None if instead is None else self._form.file_name(instead)
        converted = {key: self._convert(key, value, replaced) for key, value in tensors.items()}
        shard = self._form.shard(converted)
        self._put(name, *shard)
        if replaced is not None:
            self._replace(replaced)
        self._stored[name] = shard.nbytes
        self._places |= dict.fromkeys(converted, name)
        return name

    def stored(self, tag: str) -> dict[str, np.ndarray]:
        return {key: tensor.read() for key, tensor in self._read(self._form.file_name(tag)).items()}

    def finish(self, files: Mapping[str, bytes] | None = None) -> None:
        """Write the other files of the source, the configuration and the index, which complete the model.

        `files`, by name, replace the source's files, unless the folder already holds a file with that name.

        Raises:
            ModelError: if tensors of the model were never written.
            DiskError: if writing fails.
        """
        missing = [key for key in self._expected if key not in self._places]
        if missing:
            raise ModelError(f"{len(missing)} tensors were not written, the first {missing[0]}; write all, then finish")
        if not self._writes:
            return
        own = files or {}
        carried = {} if isinstance(self._form, Joined) else self.files
        for name, content in {**carried, **own}.items():
            if name not in own or not (self.output / name).exists():
                self._put_content(name, content)
        # The last file comes last: a model that has it is complete.
        if isinstance(self._form, Joined):
            self._put(self._form.last, *self._form.joined(self.output / name for name in self._stored))
        else:
            self._put_content("config.json", _to_json(self._config()))
            self._put_content(self._form.last, _to_json(self._index()))
        for name in self._replaced:
            (self.output / name).unlink(missing_ok=True)

    def _config(self) -> dict[str, Any]:
        config = dict(self._source.config)
        sizes: Counter[str] = Counter()
        for key in self._places:
            if key not in self._form.bits:
                sizes[self.dtype_of(key).name] += self._nbytes(key)
        for name in [name for name in ("dtype", "torch_dtype") if name in config] or ["dtype"]:
            config[name] = sizes.most_common(1)[0][0]
        matrices = [key for key, shape in self._expected.items() if len(shape) == 2]
        return self._form.config(config, [key.removesuffix(".weight") for key in matrices if key.endswith(".weight")])

    def _index(self) -> dict[str, Any]:
        places = {key: name for name in self._stored for key in read_header(self.output / name)}
        return {"metadata": {"total_size": self.stored_bytes}, "weight_map": dict(sorted(places.items()))}

    def _put_content(self, name: str, content: bytes) -> None:
        self._put(name, len(content), lambda file: file.write_bytes(content))

    def _read(self, name: str) -> Mapping[str, Readable]:
        return self._form.read(self.output / name)

    def _adopt(self, name: str) -> None:
        self._stored[name] = self._form.stored_bytes(self.output / name)
        self._places |= dict.fromkeys(self._read(name), name)

    def _replace(self, name: str) -> None:
        """Count the tensors of a finished shard as unwritten; its file is removed at the end."""
        del self._stored[name]
        self._replaced.append(name)
        self._places = {key: place for key, place in self._places.items() if place != name}

    def _nbytes(self, key: str) -> int:
        return math.prod(self._expected[key]) * self.dtype_of(key).itemsize

    def _prepare(self, keep: Collection[str] | None) -> None:
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            held = sorted(entry.name for entry in self.output.iterdir())
            free = shutil.disk_usage(self.output).free
        except OSError as error:
            raise ModelError(f"cannot use {self.output} as output folder: {error.strerror}; choose another") from error
        if held and keep is None:
            raise ModelError(
                f"the output folder {self.output} is not empty (it holds {listed(held)}); choose another or empty it"
            )
        needed = self._form.copies * sum(
            self._form.most_bytes(key, TensorInfo(shape, self.dtype_of(key))) for key, shape in self._expected.items()
        )
        needed -= sum((self.output / self._form.file_name(tag)).stat().st_size for tag in keep or ())
        if needed > free:
            raise ModelError(
                f"{self.output} has {free:,} bytes free, the model needs {needed:,}; make room or choose another"
            )

    def _convert(self, key: str, value: np.ndarray | UnreadTensor, replaced: str | None) -> UnreadTensor:
        if key not in self._expected or self._places.get(key, replaced) != replaced:
            raise ModelError(f"{key} is no tensor of this model, or was written already")
        if value.shape != self._expected[key]:
            raise ModelError(f"{key} has the shape {list(value.shape)}, expected {list(self._expected[key])}")
        if isinstance(value, UnreadTensor):
            dtype = self.dtype_of(key)
            return UnreadTensor(value.shape, dtype, lambda: (self._cast(key, p) for p in value.pieces()), value.origin)
        whole = self._cast(key, value)
        return UnreadTensor(whole.shape, whole.dtype, lambda: [whole])

    def _cast(self, key: str, value: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            converted = np.asarray(value).astype(self.dtype_of(key), copy=False)
        if not np.isfinite(converted).all():
            raise ModelError(f"{key} holds NaN or infinity as {converted.dtype}; it was not written")
        return converted

    def _put(self, name: str, nbytes: int, write: Callable[[Path], Any]) -> None:
        if not self._writes:
            return
        safe = "; finished and safe are: " + (", ".join(self.shards) or "none yet")
        with replacing(self.output / name, nbytes, safe) as temporary:
            write(temporary)


def _writable(dtype: Any) -> np.dtype:
    with contextlib.suppress(TypeError):
        dtype = np.dtype(dtype)
        if dtype in WRITABLE:
            return dtype
    raise ModelError(f"cannot write dtype {dtype}; choose one of {', '.join(map(str, WRITABLE))}")


def _to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
