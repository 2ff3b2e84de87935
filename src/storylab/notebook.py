"""The losses of a run as a picture in a notebook that grows while the run trains."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from storylab.errors import UserError
from storylab.record.schema import EvaluationRow, IterationRow, Row, Summary
from storylab.training.observers import Observer

# Points of a curve in the picture; more cannot be told apart.
MOST_POINTS = 1000
# Drawing may take this share of a run's time.
SHARE = 0.05


class LivePlot(Observer):
    """Draws training and validation losses: ``storylab.train(config, LivePlot())``.

    The picture is an SVG in the notebook itself: it stays when the notebook is saved, and the browser
    loads nothing for it. Losses are nats a token.

    Args:
        seconds: the shortest time between two pictures; longer where drawing takes long.

    Raises:
        UserError: IPython, which every notebook has, is missing.
    """

    def __init__(self, seconds: float = 2.0) -> None:
        try:
            import IPython.display as display
        except ImportError as error:
            raise UserError("a plot in a notebook needs IPython: pip install ipykernel") from error
        self._display, self._seconds = display, seconds
        self._training: list[dict[str, Any]] = []
        self._validation: list[dict[str, Any]] = []
        self._place: Any = None
        self._title, self._next = "", 0.0

    def start(self, folder: Path) -> None:
        """See :class:`storylab.training.observers.Observer`."""
        self._title = folder.name

    def row(self, row: Row) -> None:
        """Add a point; draw if it is time to."""
        if isinstance(row, IterationRow):
            self._training.append(_point("training", row.iteration, row.loss))
        elif isinstance(row, EvaluationRow):
            self._validation.append(_point("validation", row.iteration, row.val_loss))
        begin = time.monotonic()
        if begin >= self._next:
            self._draw()
            spent = time.monotonic() - begin
            self._next = begin + max(self._seconds, spent / SHARE)

    def end(self, summary: Summary | None) -> None:
        """Draw all points."""
        self._draw()

    def _draw(self) -> None:
        picture = self._display.SVG(vl_convert.vegalite_to_svg(self._chart().to_dict()))
        if self._place is None:
            self._place = self._display.display(picture, display_id=True)
        else:
            self._place.update(picture)

    def _chart(self) -> Any:
        thinned = self._training[:: -(-len(self._training) // MOST_POINTS) or 1]
        base = alt.Chart(alt.Data(values=thinned + self._validation))
        return (
            base.mark_line(point={"size": 12})
            .encode(
                x=alt.X("iteration:Q"),
                y=alt.Y("loss:Q", title="loss (nats a token)", scale=alt.Scale(zero=False)),
                color=alt.Color("split:N", title=None),
            )
            .properties(title=self._title, width=480, height=260)
        )


def _point(split: str, iteration: int, loss: float | None) -> dict[str, Any]:
    return {"split": split, "iteration": iteration, "loss": loss}
