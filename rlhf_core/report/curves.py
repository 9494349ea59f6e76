"""Plot the training curves of one or more runs in one figure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path


def read_metrics(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Read metrics.jsonl as {name: [(step, value), ...]}, without values that are not finite (text in the file)."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                curves.setdefault(name, []).append((row["step"], value))
    return curves


def plot_curves(panels: Mapping[str, tuple[Path, list[str]]], file: Path, *, columns: int = 3) -> Path:
    """Plot one panel for each title: the named metrics of a run's folder over its steps. Needs the extra `plots`.

    Returns `file`, the path of the image.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install 'rlhf-core[plots]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4.6 * columns, 3.1 * rows), squeeze=False)
    for axis, (title, (run, names)) in zip(axes.flat, panels.items(), strict=False):
        curves = read_metrics(run)
        for name in names:
            if points := curves.get(name, []):
                marker = "o" if len(points) < 30 else None
                axis.plot(*zip(*points, strict=True), label=name, marker=marker, markersize=3)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
    return file
