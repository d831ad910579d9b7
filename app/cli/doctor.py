"""`dinat doctor`: check a machine before it is used. The exit status is 1 if there is a problem."""

import json
import os
import sys
import warnings
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from dinat.app.doctor import Report, examine
from dinat.app.measurements import Row
from dinat.app.server.heap import keep_freed_memory
from dinat.model.config import PRESETS
from dinat.model.native import default_cache


def doctor(
    *,
    preset: Annotated[str, typer.Option(metavar="|".join(PRESETS), help="Published network to measure.")] = "mini",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the full report as JSON on standard output.")] = False,
) -> None:
    """Check this machine's hardware, correctness and speed. The exit status is 1 if there is a problem."""
    warnings.simplefilter("ignore")
    keep_freed_memory()
    with suppress(ModuleNotFoundError):  # logging is optional here
        from dinat.app.logs import configure_logs

        configure_logs("console")
    cache = Path(os.environ.get("DINAT_CACHE_DIR") or default_cache())
    report = examine(preset, device, cache, lambda step: print(f"measuring {step} ...", file=sys.stderr))
    if as_json:
        print(json.dumps(asdict(report), indent=2))
    else:
        _print_report(report)
    if report.problems:
        raise typer.Exit(1)


def _print_report(report: Report) -> None:
    """Print the report as tables."""
    from rich.console import Console
    from rich.table import Table

    from dinat.app.cli.plain_text import plain_text

    console = Console(highlight=False)
    console.width = max(console.width, 100)

    def print_table(title: str, rows: list[Row], caption: str = "") -> None:
        if not rows:
            return
        columns = list(dict.fromkeys(key for row in rows for key in row))
        table = Table(title=title, caption=caption or None, title_justify="left", caption_justify="left")
        for column in columns:
            is_numeric = any(isinstance(row.get(column), int | float) for row in rows)
            table.add_column(column, justify="right" if is_numeric else "left", overflow="fold")
        for row in rows:
            table.add_row(*(plain_text(_text(row.get(column))) for column in columns))
        console.print(table)

    for values in (report.machine, report.versions):
        console.print(plain_text(", ".join(f"{name} {value}" for name, value in values.items())))
    print_table("GPUs", report.devices)
    print_table("Ceilings", report.ceilings)
    batch = report.attention[0]["batch"]
    rows = [{key: value for key, value in row.items() if key != "batch"} for row in report.attention]
    caption = f"us per batch of {batch}; error relative to the norm of the reference; * marks the selected backend"
    print_table("Attention", rows, caption)
    print_table("Throughput", report.rates)
    print_table("Missing", report.missing)
    for note in report.notes:
        console.print(plain_text(f"note: {note}"))
    for problem in report.problems:
        console.print("[bold red]problem:[/]", plain_text(problem))
    if not report.problems:
        console.print("[bold green]No problems found.[/]")


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "*" if value else ""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
    return str(value)
