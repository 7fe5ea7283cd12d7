"""Shared parts of the benchmarks of fitted solvers: stored results, references, measurements, and tables."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import iia_ode as iia
from iia_ode.experiments import Setting, batch_seed, get_setting
from iia_ode.files import read_tensors, write_bytes, write_tensors
from iia_ode.metrics import rmse_with_error
from iia_ode.plan import Plan
from iia_ode.teacher import Teacher

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ROOT / "docs" / "results"
CACHE = ROOT / "build" / "benchmarks"
"""Folder of converged trajectories, too large for the repository and reproducible."""

BAD = 0.1  # RMSE above which a sample counts as bad
CHUNK = 64
CHECKED = 64  # samples of a network's reference checked with fewer steps
RHOS = (3.0, 5.0, 7.0, 9.0)
LEVELS = (0.002, 0.01, 0.03, 0.06, 0.1, 0.2, 0.3)
KARRAS = [(rho, level) for rho in RHOS for level in LEVELS]
DEFAULT = (7.0, 0.002)
CHOICE = 3  # raise whenever the choices of `iia_ode.fit` change: entries with a lower number are made again

Entry = dict[str, Any]


def _code() -> str:
    digest = hashlib.sha256()
    for path in sorted((ROOT / "iia_ode").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


CODE = _code()
"""Hash of the library's sources, to tell states between two versions."""


def say(text: str) -> None:
    """Print a line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


# ---- stored results ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Store:
    """A folder of JSON files with entries by name. Each entry is written at once, in one atomic move.

    Attributes
    ----------
    folder : folder of the files.
    """

    folder: Path

    def read(self, file: str) -> dict[str, Entry]:
        """All entries of a file; an empty dictionary for a missing file."""
        path = self.folder / f"{file}.json"
        found: dict[str, Entry] = json.loads(path.read_text()) if path.exists() else {}
        return found

    def files(self) -> dict[str, dict[str, Entry]]:
        """All files."""
        return {path.stem: self.read(path.stem) for path in sorted(self.folder.glob("*.json"))}

    def put(self, file: str, name: str, entry: Entry) -> None:
        """Write an entry; other entries of the file are unchanged."""
        entries = self.read(file) | {name: entry}
        # One line per entry: a changed figure is a changed line.
        lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(_plain(v), allow_nan=False)}" for k, v in entries.items())
        write_bytes(self.folder / f"{file}.json", f"{{\n{lines}\n}}\n".encode())

    def cell(self, file: str, name: str, under: Entry, make: Callable[[], Entry]) -> Entry:
        """The entry under the given conditions, from the file or made now.

        An entry with other conditions, such as another number of samples, is made again. A newer version of the library alone
        does not invalidate an entry.
        """
        known = self.read(file).get(name)
        if known is not None and known["under"] == _plain(under):
            return known
        begun = time.perf_counter()
        entry = make() | {"under": under, "library": iia.__version__, "code": CODE}
        entry["cell_seconds"] = time.perf_counter() - begun
        self.put(file, name, entry)
        say(f"{file} {name}: {brief(entry)} ({entry['cell_seconds']:.1f} s)")
        return entry


def brief(entry: Entry) -> str:
    """A short summary of an entry."""
    if entry.get("skipped"):
        return f"skipped, {entry['skipped']}"
    kept = {
        k: v
        for k, v in entry.items()
        if isinstance(v, int | float | str) and k not in ("library", "code", "cell_seconds")
    }
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in kept.items())


def _plain(value: Any) -> Any:
    """JSON-ready values: six digits of numbers, None for non-finite numbers, lists for tuples."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


# ---- batches and references ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Batch:
    """Initial states with their converged final states.

    Attributes
    ----------
    setting, ode, x : the problem and the states.
    final : converged final states [B, ...].
    about : method and accuracy of the final states; JSON-ready.
    """

    setting: Setting
    ode: iia.ProbabilityFlowODE
    x: Tensor
    final: Tensor
    about: Entry

    @property
    def start(self) -> float:
        """The time of the initial states."""
        return start_of(self.setting)

    def first(self, n: int) -> Batch:
        """The first n samples."""
        part = slice(0, n)
        return Batch(self.setting, self.ode.subset(part, len(self.x)), self.x[part], self.final[part], self.about)


@cache
def setting_of(name: str) -> Setting:
    """The setting, memoized."""
    return get_setting(name)


def is_closed_form(setting: Setting) -> bool:
    """Whether an evaluation costs next to nothing."""
    return setting.is_closed_form


def kind_of(name: str) -> str:
    """The kind of a setting, ``"closed form"`` or ``"network"``; closed forms get more draws."""
    return "closed form" if is_closed_form(setting_of(name)) else "network"


def start_of(setting: Setting) -> float:
    """The start time of runs."""
    return setting.schedule.t_of_noise_to_signal(setting.sigma_max)


@cache
def batch(name: str, samples: int, seed: int, unseen: bool, steps: int = 150) -> Batch:
    """Noise for fits or, with `unseen`, for measuring, with a reference.

    The reference of closed forms is dopri8 in float64 at the setting's tolerance. The reference of networks is `steps` steps
    of the teacher's method; on the first 64 samples, the distance to two thirds of the steps is recorded.
    """
    setting = setting_of(name)
    ode, x = setting.draw(samples, batch_seed(seed, unseen=unseen))
    start, end = start_of(setting), setting.schedule.t_data
    path = CACHE / f"{name}-{samples}-{seed}-{'unseen' if unseen else 'fit'}-{steps}.safetensors"
    try:
        tensors, header = read_tensors(path, "benchmark reference")
        if torch.equal(tensors["x"], x):
            return Batch(setting, ode, x, tensors["final"], header["about"])
    except iia.errors.FileFormatError:
        pass
    say(f"{name}: reference of {samples} {'unseen' if unseen else 'fitting'} samples")

    def solve(count: int, steps: int) -> Tensor:
        own = slice(0, count)
        low, sub = setting.sigma_min, ode.subset(own, len(x))
        return Teacher.solve(sub, x[own], start, end, steps=steps, sigma_min=low, chunk_size=CHUNK).final

    if is_closed_form(setting):
        tolerance = setting.reference_tolerance
        final = iia.reference.solve(ode, x, start, end, rtol=tolerance, atol=tolerance, sigma_min=setting.sigma_min)
        about = {"reference": f"dopri8 in float64, tolerance {tolerance:g}"}
    else:
        final = solve(samples, steps)
        checked, fewer = min(CHECKED, samples), 2 * steps // 3
        distance, _ = rmse_with_error(solve(checked, fewer), final[:checked])
        about = {
            "reference": f"{steps} steps of the teacher's method",
            "check": f"{distance:.1e} from {fewer} steps on {checked} samples",
        }
    write_tensors(path, "benchmark reference", {"x": x, "final": final}, {"about": about})
    return Batch(setting, ode, x, final, about)


@cache
def teacher_of(name: str, samples: int, seed: int, steps: int = 60) -> Teacher:
    """Trajectories of the fitting noise."""
    setting = setting_of(name)
    ode, x = setting.draw(samples, batch_seed(seed, unseen=False))
    return Teacher.solve(
        ode, x, start_of(setting), setting.schedule.t_data, steps=steps, sigma_min=setting.sigma_min, chunk_size=CHUNK
    )


# ---- measuring -----------------------------------------------------------------------------------------------------------


def chunk_of(setting: Setting) -> int:
    """The fastest chunk size for a setting's model: a mixture's components times 256 samples fit in the CPU cache."""
    return 256 if is_closed_form(setting) else CHUNK


@torch.no_grad()
def run(plan: Plan, batch: Batch) -> Tensor:
    """Final states, computed in chunks of the batch; non-finite values are kept."""
    n = len(batch.x)
    size = chunk_of(batch.setting)
    parts = [slice(i, min(i + size, n)) for i in range(0, n, size)]
    return torch.cat([plan.run(batch.ode.subset(p, n), batch.x[p], check_finite=False) for p in parts])


def squares(final: Tensor, reference: Tensor) -> Tensor:
    """Mean square error of each sample, in float64."""
    return (final.double() - reference.double()).square().flatten(1).mean(dim=1)


def measure(plan: Plan, batch: Batch) -> Entry:
    """RMSE with its standard error, the median of the samples' own RMSE, and the share of bad samples."""
    final = run(plan, batch)
    value, error = rmse_with_error(final, batch.final)
    own = squares(final, batch.final).sqrt()
    return {"rmse": value, "error": error, "median": float(own.median()), "bad": float((~(own <= BAD)).double().mean())}


def error_of(plan: Plan, batch: Batch) -> float:
    """RMSE; infinite where the run is not finite."""
    value, _ = rmse_with_error(run(plan, batch), batch.final)
    return value if math.isfinite(value) else math.inf


def karras_family(setting: Setting, rho: float, level: float) -> Callable[[int], Tensor]:
    """A function from a number of levels to the Karras grid below the setting's noisiest level."""
    start = start_of(setting)

    def make(n: int) -> Tensor:
        grid = iia.grids.karras(n, level, setting.sigma_max, rho, schedule=setting.schedule)
        grid[0] = start
        return grid

    return make


_LEVELS: dict[tuple[object, ...], int | None] = {}  # shared by settings with the same schedule and start


def levels_for(solver: str, name: str, nfe: int) -> int | None:
    """The number of levels for `nfe` evaluations of a solver; None where no number gives `nfe`."""
    setting = setting_of(name)
    key = solver, setting.schedule, setting.sigma_max, nfe
    if key not in _LEVELS:
        try:
            grid = iia.get_solver(solver).grid_for(nfe, karras_family(setting, *DEFAULT), setting.schedule)
        except iia.errors.GridError:
            grid = None
        _LEVELS[key] = None if grid is None else len(grid) - 1
    return _LEVELS[key]


def grid_of(solver: str, name: str, nfe: int, grid: tuple[float, float] = DEFAULT) -> Tensor:
    """The Karras grid with `nfe` evaluations of a solver; `grid` is (rho, smallest level)."""
    levels = levels_for(solver, name, nfe)
    if levels is None:
        raise iia.errors.GridError(f"{solver} cannot make {nfe} evaluations.")
    return karras_family(setting_of(name), *grid)(levels)


def plan_of(solver: str, setting: Setting, grid: Tensor) -> Plan:
    """The plan of a registered solver on a grid."""
    return iia.plan.trace(iia.get_solver(solver), setting.schedule, grid, consistent=False)


# ---- command line and pages ----------------------------------------------------------------------------------------------


def parser(text: str, name: str, settings: Sequence[str], nfes: Sequence[int]) -> argparse.ArgumentParser:
    """The common options of the scripts."""
    found = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--settings", nargs="+", default=list(settings), help="default: %(default)s")
    found.add_argument("--nfe", nargs="+", type=int, default=list(nfes), help="default: %(default)s")
    found.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    found.add_argument("--out", type=Path, default=RESULTS / name, help="folder of the results (default: %(default)s)")
    found.add_argument("--page", type=Path, default=PAGES / f"{name}.md", help="what --table writes")
    found.add_argument("--table", action="store_true", help="only write the page, from the stored results")
    return found


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; all columns but the first `left` are right-aligned."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *rows)) + "\n"


def number(value: float | None, digits: int = 4) -> str:
    """A figure of a table; a dash for None."""
    return "-" if value is None else f"{value:.{digits}f}" if abs(value) < 1e4 else f"{value:.1e}"


def conditions(entries: Iterable[Entry], *keys: str) -> str:
    """The values of the given conditions over all entries, and the versions of the code."""
    found = []
    entries = list(entries)
    for key in keys:
        values = {json.dumps(e["under"][key]) for e in entries if key in e.get("under", {})}
        if values:
            found.append(f"{key.replace('_', ' ')} {', '.join(sorted(values))}")
    versions = sorted({e["library"] for e in entries if "library" in e})
    codes = sorted({e.get("code", "not noted") for e in entries})
    return "; ".join([*found, f"iia_ode {', '.join(versions)}, sources {', '.join(codes)}"])


def write_page(path: Path, text: str) -> None:
    """Write a page."""
    write_bytes(path, (text.rstrip() + "\n").encode())
    say(f"wrote {path.name}")
