"""Write docs/configuration.md from the settings.

python -m tests.docs.configuration
"""

from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from dinat.app.settings import Settings

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
INTRODUCTION = """# Configuration

Settings are environment variables with the prefix `DINAT_`, such as `DINAT_MAX_BATCH=32`, lines of a file `.env` in the
working directory, or flags of `dinat serve`, such as `--max-batch 32`. A flag overrides the environment, which overrides the
file. An empty variable is as none. An invalid value stops the start with one line that names it.

This page is generated from `app/settings.py` (`python -m tests.docs.configuration`).

| setting | default | description |
|---|---|---|
"""


def page() -> str:
    """Return the text of the page."""
    rows = []
    for name, field in Settings.model_fields.items():
        description, _, stated = (field.description or "").partition(" Default: ")
        default = stated.rstrip(".") or _text(field.default)
        rows.append(f"| `{name.upper()}` | {default} | {description} |".replace("|  |", "| |"))
    return INTRODUCTION + "\n".join(rows) + "\n"


def _text(default: Any) -> str:
    if default is None or default is PydanticUndefined or default == "":
        return ""
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, tuple):
        return f"`{','.join(default)}`" if default else ""
    if isinstance(default, int) and default >= 2**20 and default % 2**20 == 0:
        return f"{default // 2**20} MiB"
    return f"`{default}`"


if __name__ == "__main__":
    PAGE.write_text(page())
