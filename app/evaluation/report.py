"""An evaluation as a self-contained HTML page. Requires the extra `evaluate` (matplotlib)."""

import base64
import io
from collections.abc import Sequence
from html import escape

from matplotlib.figure import Figure

from dinat.app.evaluation.scores import Evaluation
from dinat.app.evaluation.summaries import LOWEST_RECALL, MAX_CLASSES_SHOWN, hides_classes, shown_classes, summary

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { padding: .2rem .8rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left }
img { max-width: 100% }
"""


def html_report(evaluations: Sequence[Evaluation], title: str) -> str:
    """Return the page: a table of all evaluations, then confusion matrix, reliability curve and classes of each."""
    parts = [f"<h1>{escape(title)}</h1>", _html_table([summary(evaluation) for evaluation in evaluations])]
    for evaluation in evaluations:
        parts.append(f"<h2>{escape(', '.join(evaluation.setting.values()))}</h2>")
        parts.append(_html_image(plot_confusion(evaluation), "confusion matrix"))
        parts.append(_html_image(plot_reliability(evaluation), "reliability curve"))
        parts.append(f"<h3>{LOWEST_RECALL if hides_classes(evaluation) else 'Classes'}</h3>")
        parts.append(_html_table(shown_classes(evaluation)))
        if evaluation.unreadable:
            parts.append("<h3>Unreadable images</h3>")
            parts.append(_html_table([{"image": path, "error": error} for path, error in evaluation.unreadable.items()]))
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def plot_confusion(evaluation: Evaluation) -> Figure:
    """Plot the confusion matrix: true classes as rows, predicted ones as columns, each row normalized to 1."""
    fractions = evaluation.confusion / evaluation.confusion.sum(axis=1, keepdims=True).clip(1)
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.add_subplot()
    matrix = axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(matrix, ax=axes, label="fraction of the true class")
    axes.set(xlabel="predicted", ylabel="true")
    if len(evaluation.names) <= MAX_CLASSES_SHOWN:
        ticks = range(len(evaluation.names))
        axes.set_xticks(ticks, evaluation.names, rotation=90)
        axes.set_yticks(ticks, evaluation.names)
    return figure


def plot_reliability(evaluation: Evaluation) -> Figure:
    """Plot accuracy by score. The area of a dot is proportional to its number of images."""
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="0.7", linestyle="--")
    rows = evaluation.reliability
    score, accuracy = [row["score"] for row in rows], [row["accuracy"] for row in rows]
    axes.plot(score, accuracy, linewidth=0.8)
    axes.scatter(score, accuracy, [8 + 250 * row["images"] / evaluation.num_images for row in rows], clip_on=False)
    axes.set(xlabel="score", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    return figure


def _html_image(figure: Figure, description: str) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return f'<img alt="{escape(description)}" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def _html_table(rows: Sequence[dict[str, str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    lines = ("".join(f"<td>{escape(value)}</td>" for value in row.values()) for row in rows)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
