"""What custom resources may say, into schemas.json, from their CustomResourceDefinitions: names, types, choices, requirements.

    python -m tests.kubernetes.reduce_crds KIND=CRD.yaml ...

The whole definitions take megabytes, most of it prose, and the parts of a pod again and again. What the chart does not use is
left open (any value is taken) or out (none is).
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

SCHEMAS = Path(__file__).with_name("schemas.json")

WORDS = [
    "type",
    "required",
    "enum",
    "pattern",
    "minimum",
    "maximum",
    "x-kubernetes-int-or-string",
    "x-kubernetes-preserve-unknown-fields",
]

OPEN = [
    "affinity",
    "volumes",
    "initContainers",
    "ephemeralContainers",
    "topologySpreadConstraints",
    "lifecycle",
    "managedFields",
]
OUT = [
    "canary",
    "explainer",
    "transformer",
    "worker",
    "workerSpec",
    "canaryStatuses",
    "status",
    "autoscaling",
    "sklearn",
    "xgboost",
    "tensorflow",
    "pytorch",
    "triton",
    "onnx",
    "huggingface",
    "pmml",
    "lightgbm",
    "paddle",
]


def reduced(schema: dict[str, Any]) -> dict[str, Any]:
    small = {word: schema[word] for word in WORDS if word in schema}
    if "properties" in schema:
        small["properties"] = {
            name: {} if name in OPEN else reduced(one) for name, one in schema["properties"].items() if name not in OUT
        }
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            small["additionalProperties"] = False  # as a cluster in strict validation has it
    for word in ("items", "additionalProperties"):
        if isinstance(schema.get(word), dict):
            small[word] = reduced(schema[word])
    return small


def main() -> None:
    found = {}
    for given in sys.argv[1:]:
        kind, _, path = given.partition("=")
        definition = yaml.safe_load(Path(path).read_text())
        assert definition["spec"]["names"]["kind"] == kind
        for version in definition["spec"]["versions"]:
            if version["storage"]:
                found[f"{definition['spec']['group']}/{version['name']} {kind}"] = reduced(version["schema"]["openAPIV3Schema"])
    SCHEMAS.write_text(json.dumps(found, separators=(",", ":"), sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
