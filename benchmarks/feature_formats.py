"""The maps of DiNAT-Mini's four stages, written in each form that POST /features has: time and size.

python -m benchmarks.feature_formats [--rounds 20] [--json FILE]
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from benchmarks.timing import report, take_turns
from dinat.app.api.features import NPZ, SAFETENSORS, WRITERS, flatten_features
from dinat.app.api.results import features
from dinat.app.engine.runtimes.runtime import InferenceResult
from dinat.model import DinatConfig


def maps() -> InferenceResult:
    """Of one picture of 224x224, random."""
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
    answer = maps()
    writers = {
        "json": lambda: orjson.dumps(features(answer, "json"), option=orjson.OPT_SERIALIZE_NUMPY),
        "json, base64": lambda: orjson.dumps(features(answer, "base64")),
        **{
            f"{kind}, {dtype}": lambda kind=kind, dtype=dtype: WRITERS[kind](flatten_features(answer, dtype))
            for kind in (NPZ, SAFETENSORS)
            for dtype in ("float32", "float16")
        },
    }
    seconds = take_turns(writers, arguments.rounds)
    sizes = {name: len(write()) for name, write in writers.items()}
    rows: list[dict[str, Any]] = [
        {
            "form": name,
            "ms": seconds[name] * 1e3,
            "MB": sizes[name] / 1e6,
            "times faster than json": seconds["json"] / seconds[name],
            "times smaller": sizes["json"] / sizes[name],
        }
        for name in writers
    ]
    report("Maps of DiNAT-Mini, stages 1 to 4", rows, arguments.json)


if __name__ == "__main__":
    main()
