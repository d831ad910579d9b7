"""`dinat doctor`: what a user with a new machine runs first. Exit status 1 where something is wrong."""

import json
import os
import sys
import warnings
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from dinat.app.doctor import Report, Row, examine
from dinat.app.server.heap import keep_freed_memory
from dinat.model.config import PRESETS
from dinat.model.native import default_cache


def doctor(
    *,
    preset: Annotated[str, typer.Option(metavar="|".join(PRESETS), help="Published network to measure with.")] = "mini",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="All that was found, as JSON on standard output.")] = False,
) -> None:
    """See what this machine has, whether it computes rightly, and how fast. Exit status 1 where something is wrong."""
    warnings.simplefilter("ignore")
    keep_freed_memory()
    with suppress(ModuleNotFoundError):  # nor does the log want what is not there
        from dinat.app.logs import configure_logs

        configure_logs("console")
    cache = Path(os.environ.get("DINAT_CACHE_DIR") or default_cache())
    report = examine(preset, device, cache, lambda what: print(f"measuring {what} ...", file=sys.stderr))
    if as_json:
        print(json.dumps(asdict(report), indent=2))
    else:
        _show(report)
    if report.wrong:
        raise typer.Exit(1)


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
