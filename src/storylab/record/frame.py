"""The rows of a run as a pandas dataframe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import msgspec

from storylab.errors import UserError
from storylab.record.schema import EvaluationRow, IterationRow, QuantizationRow, Row

if TYPE_CHECKING:
    import pandas

RowKind = Literal["iteration", "evaluation", "quantization"]
ROWS: dict[RowKind, type[Row]] = {
    "iteration": IterationRow,
    "evaluation": EvaluationRow,
    "quantization": QuantizationRow,
}


def rows_frame(rows: Sequence[Row], kind: RowKind) -> pandas.DataFrame:
    """The rows of one kind: a column a field, in the units of :mod:`storylab.record.schema`, by iteration.

    A number that the machine does not have is NaN.

    Raises:
        UserError: pandas is not installed, or there is no such kind.
    """
    if kind not in ROWS:
        raise UserError(f"unknown kind of row '{kind}': use one of {', '.join(ROWS)}")
    try:
        import pandas
    except ImportError as error:
        raise UserError("a dataframe needs pandas: pip install 'storylab[notebook]'") from error
    names = ROWS[kind].__struct_fields__
    values = [msgspec.structs.astuple(row) for row in rows if isinstance(row, ROWS[kind])]
    frame = pandas.DataFrame(values, columns=list(names))
    # A column of None alone has no type of its own.
    absent = [name for name in names if values and frame[name].isna().all()]
    return frame.astype(dict.fromkeys(absent, "float64")).set_index("iteration")
