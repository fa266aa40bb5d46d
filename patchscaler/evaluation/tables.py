"""Markdown tables of what was measured. A row is a dict from columns to values; a column may be missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from patchscaler.evaluation.scores import METRICS

Rows = Sequence[Mapping[str, str | float]]

# Column → its heading, with an arrow to where it gets better, and the digits of a mean.
HEADINGS = {
    **{metric.key: (f"{metric.label} {metric.better}", metric.digits) for metric in METRICS},
    "seam_score": ("seam score", 3),
    "evaluations": ("evaluations", 0),
    "seconds": ("seconds", 2),
}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table of cells."""
    first, *lines = (f"| {' | '.join(cells)} |" for cells in (head, *rows))
    return [first, "|" + "---|" * len(head), *lines]


def means_table(groups: Mapping[str, Rows], first: str = "mean of") -> list[str]:
    """A line for each group of rows: the mean of every column over those of its rows that have it."""
    columns = _columns(groups)
    lines = []
    for name, rows in groups.items():
        means = [mean_of(rows, column) for column in columns]
        cells = ["" if mean is None else f"{mean:.{HEADINGS[column][1]}f}" for column, mean in zip(columns, means)]
        lines.append([name, *cells])
    return table([first, *(HEADINGS[column][0] for column in columns)], lines)


def differences_table(groups: Mapping[str, Rows], reference: str) -> list[str]:
    """How far the measures of the other methods lie from the reference's, image by image: mean ± standard error.

    The groups are rows of the same images in the same order. With one image there is no error to give.
    """
    columns = [column for column in _columns(groups) if column not in ("evaluations", "seconds")]
    lines = []
    for name in (name for name in groups if name != reference):
        cells = []
        for column in columns:
            pairs = zip(groups[name], groups[reference])
            gaps = [mine[column] - its[column] for mine, its in pairs if column in mine and column in its]
            cells.append(_difference(gaps, HEADINGS[column][1] + 1))
        lines.append([name, *cells])
    return table([f"minus {reference}", *(HEADINGS[column][0] for column in columns)], lines)


def mean_of(rows: Rows, column: str) -> float | None:
    """Mean over the rows that have the column; None if none has."""
    values = [row[column] for row in rows if column in row]
    return sum(values) / len(values) if values else None


def _columns(groups: Mapping[str, Rows]) -> list[str]:
    return [column for column in HEADINGS if any(column in row for rows in groups.values() for row in rows)]


def _difference(gaps: list[float], digits: int) -> str:
    if not gaps:
        return ""
    error = f" ± {np.std(gaps, ddof=1) / len(gaps) ** 0.5:.{digits}f}" if len(gaps) > 1 else ""
    return f"{np.mean(gaps):+.{digits}f}{error}"
