"""Write a checkpoint as an OpenVINO model of 16, 8 or 4 bits, by optimum-intel.

    .tools/openvino/bin/python -m benchmarks.cpu_models.openvino_export CHECKPOINT OUT 4

Runs in OpenVINO's environment. 8 bits have a scale per output channel; 4 bits one per 64 input channels, in
all matrices, without zero points: the counterparts of our `int8_ch` and `int4_g64`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig


def export(checkpoint: Path, out: Path, bits: int) -> None:
    """Write openvino_model.xml and .bin."""
    quantization = None
    if bits == 8:
        quantization = OVWeightQuantizationConfig(bits=8, sym=True)
    elif bits == 4:
        quantization = OVWeightQuantizationConfig(bits=4, sym=True, group_size=64, ratio=1.0, all_layers=True)
    options = {"load_in_8bit": False} if quantization is None else {"quantization_config": quantization}
    model = OVModelForCausalLM.from_pretrained(checkpoint, export=True, compile=False, **options)
    model.save_pretrained(out)


if __name__ == "__main__":
    export(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
