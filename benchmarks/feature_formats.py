"""The feature maps of DiNAT-Mini's four stages in each format of POST /features: encoding time and size.

    python -m benchmarks.feature_formats [--rounds 20] [--json FILE]

`speedup` and `compression` are relative to json.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from benchmarks.timing import median_seconds, report
from dinat.app.api.features import NPZ, SAFETENSORS, WRITERS, flatten_features
from dinat.app.api.results import features
from dinat.app.engine.runtimes.runtime import InferenceResult
from dinat.model import DinatConfig


def random_result() -> InferenceResult:
    """Return random feature maps with the shapes of one 224x224 image."""
    config, random = DinatConfig.preset("mini"), np.random.default_rng(0)
    return InferenceResult(
        np.empty(0, np.int64),
        np.empty(0, np.float32),
        {
            name: random.standard_normal((config.channels_of(i), 56 >> i, 56 >> i), dtype=np.float32)
            for i, name in enumerate(config.stage_names[1:])
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = random_result()
    writers = {
        "json": lambda: orjson.dumps(features(result, "json"), option=orjson.OPT_SERIALIZE_NUMPY),
        "json, base64": lambda: orjson.dumps(features(result, "base64")),
        **{
            f"{kind}, {dtype}": lambda kind=kind, dtype=dtype: WRITERS[kind](flatten_features(result, dtype))
            for kind in (NPZ, SAFETENSORS)
            for dtype in ("float32", "float16")
        },
    }
    seconds = median_seconds(writers, arguments.rounds)
    sizes = {name: len(write()) for name, write in writers.items()}
    rows: list[dict[str, Any]] = [
        {
            "format": name,
            "ms": seconds[name] * 1e3,
            "MB": sizes[name] / 1e6,
            "speedup": seconds["json"] / seconds[name],
            "compression": sizes["json"] / sizes[name],
        }
        for name in writers
    ]
    report("Feature maps of DiNAT-Mini, stages 1 to 4", rows, arguments.json)


if __name__ == "__main__":
    main()
