"""What is in a picture: the figures as they were saved, and the files' pixels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@contextmanager
def saved_figures() -> Iterator[dict[str, Any]]:
    """Every matplotlib figure that is saved meanwhile, by its file's name."""
    from matplotlib.figure import Figure

    found: dict[str, Any] = {}
    save = Figure.savefig

    def saving(figure: Any, path: Any, *arguments: Any, **options: Any) -> None:
        found[Path(path).name] = figure
        save(figure, path, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", saving)
        yield found


def labels(figure: Any) -> list[tuple[str, str]]:
    """(x, y) labels of a figure's axes, in order."""
    return [(axes.get_xlabel(), axes.get_ylabel()) for axes in figure.axes]


def lines(axes: Any) -> dict[str, list[tuple[float, float]]]:
    """The points of each labelled line."""
    return {
        line.get_label(): [(float(x), float(y)) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)]
        for line in axes.get_lines()
        if not line.get_label().startswith("_")
    }


def num_colors(path: Path) -> int:
    """Different colours in a PNG; a blank picture has one."""
    from matplotlib import image

    return len(np.unique(image.imread(path).reshape(-1, 4), axis=0))
