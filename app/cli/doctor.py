"""`dinat doctor`: what a user with a new machine runs first. Exit status 1 where something is wrong."""

import argparse
import json
import os
import sys
import warnings
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from app.allocator import keep_freed_memory
from app.doctor import Report, Row, examine
from app.engine.artefacts import default_cache
from model.config import PRESETS


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What to examine with, and how to say it."""
    command.add_argument("--preset", choices=PRESETS, default="mini", help="network to measure with; mini if not given")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    command.add_argument("--json", action="store_true", help="all that was found, as JSON on standard output")


def run(parsed: argparse.Namespace) -> int:
    """Examine, and say what was found."""
    warnings.simplefilter("ignore")
    keep_freed_memory()
    with suppress(ModuleNotFoundError):  # nor does the log want what is not there
        from app.logs import configure_logs

        configure_logs("console")
    cache = Path(os.environ.get("DINAT_CACHE_DIR") or default_cache())
    report = examine(parsed.preset, parsed.device, cache, lambda what: print(f"measuring {what} ...", file=sys.stderr))
    if parsed.json:
        print(json.dumps(asdict(report), indent=2))
    else:
        _show(report)
    return 1 if report.wrong else 0


def _show(report: Report) -> None:
    """The report as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.width = max(console.width, 100)

    def table(title: str, rows: list[Row], about: str = "") -> None:
        if not rows:
            return
        columns = list(dict.fromkeys(key for row in rows for key in row))
        drawn = Table(title=title, caption=about or None, title_justify="left", caption_justify="left")
        for column in columns:
            numbers = any(isinstance(row.get(column), int | float) for row in rows)
            drawn.add_column(column, justify="right" if numbers else "left", overflow="fold")
        for row in rows:
            drawn.add_row(*(_text(row.get(column)) for column in columns))
        console.print(drawn)

    console.print(", ".join(f"{name} {value}" for name, value in report.machine.items()))
    console.print(", ".join(f"{name} {value}" for name, value in report.versions.items()))
    table("Cards", report.devices)
    table("Ceilings", report.ceilings)
    batch = report.attention[0]["batch"]
    rows = [{key: value for key, value in row.items() if key != "batch"} for row in report.attention]
    table("Attention", rows, f"us for a batch of {batch}; error as a share of the definition's norm; * is what serves")
    table("Pictures a second", report.rates)
    table("Missing", report.missing)
    for fault in report.wrong:
        console.print(f"[bold red]wrong:[/] {fault}")
    if not report.wrong:
        console.print("[bold green]Nothing is wrong.[/]")


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "*" if value else ""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
    return str(value)
