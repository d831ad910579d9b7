"""Write the table of values in the chart's README.md, from values.yaml and values.schema.json.

python -m tests.kubernetes.values_table
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parents[2] / "deploy" / "kubernetes" / "dinat-serve"
README = CHART / "README.md"
START, END = "<!-- values -->\n", "<!-- end of values -->\n"


def rows(schema: dict[str, Any], values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        described = schema["properties"].get(name, {})
        if value and isinstance(value, dict) and "properties" in described:
            if "description" in described:
                yield f"| `{prefix}{name}` | | {described['description']} |"
            yield from rows(described, value, f"{prefix}{name}.")
            continue
        choices = ", ".join(f"`{choice}`" for choice in described.get("enum", ()))
        text = "; ".join(part for part in (described.get("description", ""), f"one of {choices}" if choices else "") if part)
        default = f"`{json.dumps(value)}`" if value not in ("", None) else ""
        yield f"| `{prefix}{name}` | {default} | {text} |"


def table() -> str:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    return "\n".join(["| value | default | description |", "|---|---|---|", *rows(schema, values), ""])


def readme() -> str:
    """Return README.md with the current table."""
    text = README.read_text()
    before, rest = text.split(START)
    return before + START + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    README.write_text(readme())
