"""Weights and activations of an OpenVINO model in int8 by NNCF, as sparse weight decompression needs them.

    INTERPRETER benchmarks/runtime_quantize.py FOLDER TOKENS.npz

FOLDER has what optimum-intel wrote, in float32, and is changed. The field `calibration` of TOKENS, `[windows, length]`,
gives the ranges of the activations.
"""

import sys
from pathlib import Path

import nncf
import numpy as np
import openvino


def main() -> None:
    file = Path(sys.argv[1]) / "openvino_model.xml"
    with np.load(sys.argv[2]) as stored:
        windows = stored["calibration"].astype(np.int64)
    count, length = windows.shape
    shared = {
        "attention_mask": np.ones((1, length), np.int64),
        "position_ids": np.arange(length)[None],
        "beam_idx": np.zeros(1, np.int32),
    }
    model = openvino.Core().read_model(file)
    inputs = nncf.Dataset([{"input_ids": row[None], **shared} for row in windows])
    quantized = nncf.quantize(model, inputs, subset_size=count, model_type=nncf.ModelType.TRANSFORMER)
    # The weights of the model that was read stay mapped from the file.
    openvino.save_model(quantized, file.with_name("quantized.xml"), compress_to_fp16=False)
    del model
    for suffix in (".xml", ".bin"):
        file.with_name("quantized").with_suffix(suffix).replace(file.with_suffix(suffix))


if __name__ == "__main__":
    main()
