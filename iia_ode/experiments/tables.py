"""Tables of a comparison: rows as comma-separated values and back, as Markdown, and errors by solver and count."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from ..errors import FileFormatError
from ..files import write_bytes

__all__ = ["csv_of", "error_table", "flat_markdown", "from_text", "markdown", "rows_of_csv", "to_text", "written"]

_T = TypeVar("_T")


# ---- comma-separated values ------------------------------------------------------------------------------------------


def csv_of(kind: type[Any], rows: Iterable[Any]) -> str:
    """Rows of a dataclass with fields of plain types, with a header line."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [f.name for f in fields(kind)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(to_text(row) for row in rows)
    return out.getvalue()


def rows_of_csv(kind: type[_T], text: str, source: str) -> tuple[_T, ...]:
    """The rows of :func:`csv_of`; columns without a field are ignored.

    Raises
    ------
    FileFormatError : a column is missing, or a value has another type.
    """
    return tuple(from_text(kind, row, source) for row in csv.DictReader(io.StringIO(text)))


def to_text(row: Any) -> dict[str, str]:
    """The fields of a row as texts. Texts of numbers are exact, NaN and infinity included."""
    return {f.name: str(getattr(row, f.name)) for f in fields(row)}


def from_text(kind: type[_T], row: Mapping[str, str], source: str) -> _T:
    """The row of :func:`to_text`; a field without a text has its default."""
    found: dict[str, Any] = {}
    for f in fields(kind):  # type: ignore[arg-type]
        if (value := row.get(f.name)) is not None:
            try:
                found[f.name] = _PARSERS[str(f.type)](value)
            except (ValueError, KeyError) as error:
                raise FileFormatError(f"{source} has {f.name} {value!r}, expected a value of type {f.type}.") from error
        elif f.default is MISSING:
            raise FileFormatError(f"{source} has no column {f.name!r}: give a file of Comparison.csv.")
    return kind(**found)


_PARSERS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": {"True": True, "False": False}.__getitem__,
}


# ---- text ------------------------------------------------------------------------------------------------------------


def written(path: str | os.PathLike[str] | None, text: str) -> str:
    """The text, after a file was written if there is a path."""
    if path is not None:
        write_bytes(path, text.encode())
    return text


def markdown(head: Sequence[object], rows: Iterable[Sequence[object]], left: int = 1) -> str:
    """A Markdown table; columns after the first `left` are right-aligned."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in (head, rule, *rows)
    )


def flat_markdown(rows: Sequence[Any]) -> str:
    """A Markdown table with a line for each row of a comparison."""
    head = ["solver", "grid", "NFE", "RMSE", "std. error", "sample evaluations", "seconds"]
    fitted = any(r.fit_samples for r in rows)
    head += ["fit samples", "fit sample evaluations", "fit seconds"] if fitted else []
    lines = []
    for r in rows:
        cells = [r.method, r.grid or "own", r.nfe, f"{r.rmse:.4g}", f"{r.standard_error:.2g}"]
        cells += [r.sample_evaluations, f"{r.seconds:.3g}"]
        cells += [r.fit_samples, r.fit_sample_evaluations, f"{r.fit_seconds:.3g}"] if fitted else []
        lines.append(cells)
    return markdown(head, lines, left=2)


def error_table(
    errors: Mapping[tuple[str, int], float], solvers: Sequence[str], nfes: Sequence[int], *, markdown: bool
) -> str:
    """Errors with a line for each solver and a column for each number of evaluations; a star marks the lowest of a column."""
    width = max(len("solver / NFE"), *(len(s) for s in solvers))
    best = {n: min((errors[s, n] for s in solvers if (s, n) in errors), default=math.nan) for n in nfes}
    # Four decimals, or four digits where an error is too small for them: data may have any unit.
    small = min((e for e in errors.values() if e > 0), default=1.0) < 1e-3
    style = ".3e" if small or max(errors.values()) >= 1e4 else ".4f"

    def cell(solver: str, nfe: int) -> str:
        error = errors.get((solver, nfe))
        return "-" if error is None else f"{error:{style}}{'*' if error == best[nfe] else ' '}"

    column = 8 if style == ".4f" else 11
    body = [[f"{s:<{width}}", *(f"{cell(s, n):>{column}}" for n in nfes)] for s in solvers]
    head = [f"{'solver / NFE':<{width}}", *(f"{n:>{column}}" for n in nfes)]
    if not markdown:
        return "\n".join(" ".join(row) for row in (head, *body))
    rule = ["-" * width, *(f"{'-' * (column - 1)}:" for _ in nfes)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *body))
