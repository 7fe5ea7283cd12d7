"""Running an experiment: cells are kept in a folder as they are measured, and found again."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..__about__ import __version__
from ..errors import FileFormatError, IIAError, MismatchError
from ..files import write_bytes
from ..sharing.records import surroundings
from .experiment import Experiment
from .measurements import Measurements, Row

__all__ = ["load", "run"]


def run(
    experiment: Experiment,
    folder: Path,
    seeds: Sequence[int] | None = None,
    *,
    quick: bool = False,
    command: str = "",
    say: Callable[[str], None] = lambda line: None,
) -> Measurements:
    """Measure what the folder lacks.

    Parameters
    ----------
    experiment : the experiment.
    folder : folder of the results: ``seed-K.json`` for each seed, rewritten after each cell, and ``results.csv``.
    seeds : seeds; by default those of the experiment.
    quick : whether to make a smoke run, of few and small cells.
    command : command of the run, for the record.
    say : function called with a line of text after each cell.

    Returns
    -------
    The rows of the seeds.

    Raises
    ------
    MismatchError : the folder has results of another experiment, or of a run of another size.
    FileFormatError : a file of results is damaged.
    OSError : the folder cannot be written.
    """
    chosen = tuple(experiment.seeds[:1] if quick else experiment.seeds) if seeds is None else tuple(seeds)
    cells = experiment.cells(quick)
    for seed in chosen:
        path = folder / f"seed-{seed}.json"
        about: dict[str, Any] = {"experiment": experiment.name, "size": "quick" if quick else "full", "seed": seed}
        known = _read(path, about) or about | {
            "command": command,
            "surroundings": surroundings(torch.device("cpu")) | {"iia_ode": __version__},
            "cells": {},
        }
        for cell in cells:
            if cell.name in known["cells"]:
                continue
            begun = time.perf_counter()
            rows = cell.measure(seed, folder / "kept")
            seconds = time.perf_counter() - begun
            known["cells"][cell.name] = {"seconds": round(seconds, 1), "rows": [_plain(row) for row in rows]}
            write_bytes(path, (json.dumps(known, indent=1) + "\n").encode())
            say(f"seed {seed}, {cell.name}: {len(rows)} rows in {seconds:.0f} s")
    found = load(experiment, folder, chosen)
    write_bytes(folder / "results.csv", _csv(experiment, found).encode())
    return found


def load(experiment: Experiment, folder: Path, seeds: Sequence[int] | None = None) -> Measurements:
    """Read the results of a folder.

    Parameters
    ----------
    experiment : the experiment.
    folder : folder of :func:`run`.
    seeds : seeds; by default all in the folder.

    Returns
    -------
    The rows; none if the folder has none.

    Raises
    ------
    MismatchError : the folder has results of another experiment.
    FileFormatError : a file is damaged.
    """
    paths = [folder / f"seed-{s}.json" for s in seeds] if seeds is not None else sorted(folder.glob("seed-*.json"))
    rows = []
    for path in paths:
        known = _read(path, {"experiment": experiment.name})
        if known is not None:
            rows += [{"seed": known["seed"], **row} for cell in known["cells"].values() for row in cell["rows"]]
    return Measurements(rows)


def about(folder: Path) -> dict[str, Any]:
    """Cells of all seeds, versions, commands and seconds of the runs in a folder."""
    files = [found for path in sorted(folder.glob("seed-*.json")) if (found := _read(path, {})) is not None]
    return {
        "seeds": [f["seed"] for f in files],
        "quick": any(f["size"] == "quick" for f in files),
        "cells": set.intersection(*(set(f["cells"]) for f in files)) if files else set(),
        "commands": list(dict.fromkeys(f["command"] for f in files)),
        "surroundings": files[0]["surroundings"] if files else {},
        "seconds": sum(cell["seconds"] for f in files for cell in f["cells"].values()),
    }


def _read(path: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """The file of a seed; None if there is none."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (UnicodeError, ValueError, RecursionError) as error:
        raise FileFormatError(
            f"{str(path)!r} is not a file of results: {error}. Remove the file to measure again."
        ) from None
    if not isinstance(found, dict) or not isinstance(found.get("cells"), dict):
        raise FileFormatError(
            f"{str(path)!r} is not a file of results: it has no cells. Remove the file to measure again."
        )
    for key, due in about.items():
        if found.get(key) != due:
            raise MismatchError(
                f"{str(path)!r} has {key} {found.get(key)!r}, and this run {due!r}: choose another folder."
            )
    return found


def _plain(row: Row) -> Row:
    """Six digits of numbers; non-finite numbers are errors of the experiment."""
    found: Row = {}
    for key, value in row.items():
        if isinstance(value, float):
            if not math.isfinite(value):
                raise IIAError(f"the measurement {key} is {value} in {row}.")
            value = float(f"{value:.6g}")
        found[key] = value
    return found


def _csv(experiment: Experiment, found: Measurements) -> str:
    """All rows as comma-separated values."""
    columns = list(dict.fromkeys(["seed", *experiment.keys, *(k for row in found.rows for k in row)]))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(found.rows)
    return text.getvalue()
