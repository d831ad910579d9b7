"""Reduce CustomResourceDefinitions to the names, types, choices and required fields of custom resources, in schemas.json.

    python -m tests.kubernetes.reduce_crds KIND=CRD.yaml ...

Adds them to schemas.json, or replaces them there. The complete definitions take megabytes, most of them descriptions and
repeated pod fields. Fields that the chart does not use are either unrestricted (any value is valid) or excluded (no value
is valid).
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

SCHEMAS = Path(__file__).with_name("schemas.json")

KEYWORDS = [
    "type",
    "required",
    "enum",
    "pattern",
    "minimum",
    "maximum",
    "x-kubernetes-int-or-string",
    "x-kubernetes-preserve-unknown-fields",
]

UNRESTRICTED = [
    "affinity",
    "volumes",
    "initContainers",
    "ephemeralContainers",
    "topologySpreadConstraints",
    "lifecycle",
    "managedFields",
]
EXCLUDED = [
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


def reduce_schema(schema: dict[str, Any]) -> dict[str, Any]:
    reduced = {keyword: schema[keyword] for keyword in KEYWORDS if keyword in schema}
    if "properties" in schema:
        reduced["properties"] = {
            name: {} if name in UNRESTRICTED else reduce_schema(field)
            for name, field in schema["properties"].items()
            if name not in EXCLUDED
        }
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            reduced["additionalProperties"] = False  # like a cluster's strict field validation
    for keyword in ("items", "additionalProperties"):
        if isinstance(schema.get(keyword), dict):
            reduced[keyword] = reduce_schema(schema[keyword])
    return reduced


def main() -> None:
    schemas = json.loads(SCHEMAS.read_text())
    for argument in sys.argv[1:]:
        kind, _, path = argument.partition("=")
        definition = yaml.safe_load(Path(path).read_text())
        assert definition["spec"]["names"]["kind"] == kind
        for version in definition["spec"]["versions"]:
            if version["storage"]:
                name = f"{definition['spec']['group']}/{version['name']} {kind}"
                schemas[name] = reduce_schema(version["schema"]["openAPIV3Schema"])
    SCHEMAS.write_text(json.dumps(schemas, separators=(",", ":"), sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
