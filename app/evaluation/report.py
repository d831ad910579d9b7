"""An evaluation as one HTML page, its pictures inside. Needs the extra `evaluate` (matplotlib)."""

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any

from matplotlib.figure import Figure

from dinat.app.evaluation.scores import MOST_SHOWN, Evaluation

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { padding: .2rem .8rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left }
img { max-width: 100% }
"""


def page(evaluations: Sequence[Evaluation], title: str) -> str:
    """The page: a table that has them side by side, then each with its matrix, its curve and its classes."""
    summary = _table(
        [
            {
                **one.setting,
                "pictures": one.pictures,
                "top-1": f"{one.top1:.2%}",
                "top-5": f"{one.top5:.2%}",
                "calibration error": f"{one.calibration_error:.2%}",
                "pictures/s": f"{one.pictures_per_second:.1f}",
            }
            for one in evaluations
        ]
    )
    parts = [f"<h1>{escape(title)}</h1>", summary]
    for one in evaluations:
        parts.append(f"<h2>{escape(', '.join(one.setting.values()))}</h2>")
        parts += [_picture(confusion_figure(one), "confusion matrix"), _picture(reliability_figure(one), "reliability curve")]
        shown = one.shown_classes
        parts.append(f"<h3>{'Classes' if shown is one.by_class else f'The {MOST_SHOWN} classes of lowest recall'}</h3>")
        parts.append(_table([row | {name: _share(row[name]) for name in ("recall", "precision")} for row in shown]))
        if one.unreadable:
            parts.append("<h3>Left out</h3>")
            parts.append(_table([{"picture": path, "why": why} for path, why in one.unreadable.items()]))
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def confusion_figure(evaluation: Evaluation) -> Figure:
    """True classes down, said ones across, as a share of each true class."""
    shares = evaluation.confusion / evaluation.confusion.sum(axis=1, keepdims=True).clip(1)
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the class")
    axes.set(xlabel="said", ylabel="true")
    if len(evaluation.names) <= MOST_SHOWN:
        places = range(len(evaluation.names))
        axes.set_xticks(places, evaluation.names, rotation=90)
        axes.set_yticks(places, evaluation.names)
    return figure


def reliability_figure(evaluation: Evaluation) -> Figure:
    """How often what is said with a score is right; the dots are as large as their pictures are many."""
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="0.7", linestyle="--")
    rows = evaluation.reliability
    score, accuracy = [row["score"] for row in rows], [row["accuracy"] for row in rows]
    axes.plot(score, accuracy, linewidth=0.8)
    axes.scatter(score, accuracy, [8 + 250 * row["pictures"] / evaluation.pictures for row in rows], clip_on=False)
    axes.set(xlabel="score", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    return figure


def _picture(figure: Figure, what: str) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return f'<img alt="{escape(what)}" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _table(rows: Sequence[dict[str, Any]]) -> str:
    head = "".join(f"<th>{escape(str(name))}</th>" for name in rows[0])
    lines = ("".join(f"<td>{escape(str(value))}</td>" for value in row.values()) for row in rows)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
