"""The folder of a study: references and measured cells, found again by a hash of everything that determines them."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..__about__ import __version__
from ..errors import FileFormatError, FingerprintWarning, InputError, MismatchError, warn
from ..files import bytes_of, check_writable, read_tensors, to_json, write_tensors
from ..iia import IIA, FittedSolver, Window
from ..iia.fitted import read_fit
from ..ode.distributed import Distributed
from ..ode.origin import Origin, conditions_digest
from ..ode.wrapped import layers_of
from ..plan import Plan, traced
from ..plan.storing import pack
from ..sharing.records import surroundings
from .fits import Fits
from .lines import Line
from .results import Row
from .tables import from_text, to_text
from .task import Task

__all__ = ["Cell", "Folder", "opened"]

_CELL, _REFERENCE, _MODEL = "cell of a study", "reference of a study", "model of a study"
_LEVELS = 33  # times at which two schedules are compared


@dataclass(frozen=True)
class Cell:
    """A measured cell: the row, the final states [B, ...], and the fit made for the cell, if any."""

    row: Row
    final: Tensor
    fit: FittedSolver | None


def opened(
    path: Path | None, task: Task, ends: tuple[float, float], repeats: int, say: Callable[[str], None]
) -> Folder | None:
    """The folder of a study; None without a path, or for a model that nothing identifies.

    Raises
    ------
    InputError : the ODE is distributed.
    MismatchError : the folder has another model with the same fingerprint.
    OSError : the folder cannot be written.

    Warns
    -----
    FingerprintWarning : the model has neither weights nor a tag, so nothing is kept.
    """
    if path is None:
        return None
    if any(isinstance(layer, Distributed) for layer in layers_of(task.ode)):
        raise InputError("a study of a distributed ODE has no folder: leave out resume=, or compare in one process.")
    if not task.ode.fingerprint().known:
        warn(
            f"resume={str(path)!r} keeps and finds nothing: the model has no weights that identify it. Name the model by "
            "ProbabilityFlowODE(..., tag='my-model-v1'), with another tag for every change.",
            FingerprintWarning,
        )
        return None
    check_writable(path / "check")
    folder = Folder(path, task, ends, repeats, say)
    folder.check_model()
    return folder


class Folder:
    """References and cells of studies.

    A file has the hash of its conditions as its name, so any number of studies may share a folder. A file that is damaged is
    made again.
    """

    def __init__(
        self, path: Path, task: Task, ends: tuple[float, float], repeats: int, say: Callable[[str], None]
    ) -> None:
        self.path, self.task, self.ends, self.say = path, task, ends, say
        ode, x = task.ode, task.x
        times = torch.linspace(*ends, _LEVELS, dtype=torch.float64, device="cpu").tolist()
        self.model = {
            "origin": to_json(Origin.of(ode, x)),
            "conditions": conditions_digest(ode),
            "levels": [[float(ode.schedule.alpha(t)), float(ode.schedule.sigma(t))] for t in times],
            "arithmetic": str(ode.compute_dtype(x)),
            "device": x.device.type,
            "states": _digest({}, x=x),
            "ends": list(ends),
        }
        given = None if task.reference is None else _digest({}, x=task.reference)
        about = {"sigma_min": task.sigma_min, "tolerance": task.tolerance} if given is None else {"given": given}
        self._reference = _digest({**self.model, **about})
        self._about = about
        self._common = {
            "reference": self._reference,
            "library": __version__,
            "surroundings": surroundings(x.device),
            "repeats": repeats,
        }

    # ---- the model ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def check_model(self) -> None:
        """Compare the model's output for two samples with the output in earlier studies.

        A fingerprint covers the weights of a module and not its code.

        Raises
        ------
        MismatchError : the outputs differ.
        """
        ode, x, start = self.task.ode, self.task.x, self.ends[0]
        schedule, levels = ode.schedule, [ode.schedule.noise_to_signal(t) for t in self.ends]
        t = schedule.t_of_noise_to_signal(min(max(1.0, min(levels)), max(levels)))
        t = t if schedule.knows(t) else start
        scale = math.hypot(schedule.alpha(t), schedule.sigma(t)) / math.hypot(
            schedule.alpha(start), schedule.sigma(start)
        )
        output = ode.subset(slice(0, 2), len(x)).output(x[:2] * scale, t).detach().cpu()
        place = self._place("models", _digest(self.model))
        tensors, _ = self._read(place, _MODEL)
        known = tensors.get("output")
        if known is None or known.shape != output.shape:
            write_tensors(place, _MODEL, {"output": output}, {"about": self.model})
            return
        a, b = known.double(), output.double()
        slack = min(1e-2, 1e3 * torch.finfo(ode.compute_dtype(x)).eps)
        if not float((a - b).norm()) <= slack * float(a.norm()):
            raise MismatchError(
                f"{str(self.path)!r} has cells of a model with the same fingerprint, {ode.fingerprint()}, and other outputs: "
                "the code of the model has changed. Use another folder, or name the model by ProbabilityFlowODE(..., tag=...)."
            )

    # ---- references --------------------------------------------------------------------------------------------------

    def reference(self) -> Tensor | None:
        """The accurate final states [B, ...] as computed by an earlier study."""
        tensors, _ = self._read(self._place("references", self._reference), _REFERENCE)
        found = tensors.get("final")
        return None if found is None or found.shape != self.task.x.shape else found

    def keep_reference(self, final: Tensor) -> None:
        """Write the accurate final states."""
        about = {"about": {**self.model, **self._about}}
        write_tensors(self._place("references", self._reference), _REFERENCE, {"final": final}, about)

    # ---- cells -------------------------------------------------------------------------------------------------------

    def key(self, line: Line, nfe: int, grid: Tensor | None, fits: Fits) -> str | None:
        """The name of a cell, a hash of everything that determines it; None for a fit that code alone determines."""
        method = line.method
        if method is None:
            return self._named(nfe, found=self._search(fits))
        if not isinstance(method, IIA):
            plan = _plan(method, grid, self.task)
            return self._named(nfe, plan=_plan_digest(plan), fitted=isinstance(method, FittedSolver))
        terms, target = method.terms, method.target
        plain = isinstance(terms, str | Window) and (isinstance(target, str) or _is_own(target))
        if not plain:
            self.say(f"{line.name} is fitted again in every study: code of your own determines its terms or its target")
            return None
        window = {}
        if isinstance(terms, Window):
            channels = _digest({}, x=terms.channels) if isinstance(terms.channels, Tensor) else terms.channels
            window = {"bands": terms.bands, "channels": channels, "shape": terms.shape}
        options = {k: v for k, v in method.options().items() if k != "base"}
        about = {
            **options,
            "target": asdict(options["target"]),
            "window": window,
            "base": method.base_solver.label,
            "name": method.name,
            "plan": _plan_digest(_plan(method.base_solver, grid, self.task)),
            "states": self._states(fits),
        }
        return self._named(nfe, iia=about)

    def _search(self, fits: Fits) -> dict[str, Any]:
        """Everything that determines the result of :func:`iia_ode.fit`."""
        about = {
            "budget": asdict(fits.budget),
            "seed": fits.seed,
            "highest": fits.highest,
            "states": self._states(fits),
        }
        return about | {"steps": fits.budget.steps(fits.most)}

    def _states(self, fits: Fits) -> list[Any]:
        """The states of the fits, their conditions, and the lowest level."""
        ode, x = fits.states
        return [_digest({}, x=x), conditions_digest(ode), self.task.sigma_min]

    def _named(self, nfe: int, **about: Any) -> str:
        return _digest({**self._common, "nfe": nfe, **about})

    def cell(self, key: str) -> Cell | None:
        """The cell of an earlier study; None if there is none, or if its file is damaged."""
        tensors, header = self._read(self._place("cells", key), _CELL)
        if not header:
            return None
        try:
            row = from_text(Row, header["row"], f"cell {key}")
            fit = read_fit(self._place("fits", key), schedule=self.task.ode.schedule) if header["fit"] else None
            final = tensors["final"].to(self.task.x)
        except (FileFormatError, MismatchError, LookupError, TypeError, AttributeError) as error:
            self.say(f"cell {key} is made again: {error}")
            return None
        return Cell(row, final, fit) if final.shape == self.task.x.shape else None

    def keep(self, key: str, cell: Cell) -> None:
        """Write a cell, its fit first: a cell whose file exists is whole."""
        if cell.fit is not None:
            cell.fit.save(self._place("fits", key))
        header = {"row": to_text(cell.row), "fit": cell.fit is not None, "common": self._common}
        write_tensors(self._place("cells", key), _CELL, {"final": cell.final}, header)

    # ---- files -------------------------------------------------------------------------------------------------------

    def _place(self, part: str, key: str) -> Path:
        return self.path / part / f"{key}.safetensors"

    def _read(self, place: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors and the header of a file, both empty if there is none, or if it is damaged."""
        if not os.path.lexists(place):
            return {}, {}
        try:
            return read_tensors(place, kind)
        except FileFormatError as error:
            self.say(f"made again: {error}")
            return {}, {}


def _plan(method: Any, grid: Tensor | None, task: Task) -> Plan:
    if isinstance(method, Plan | FittedSolver):
        return method if isinstance(method, Plan) else method.plan
    return traced(method, task.ode.schedule, grid if grid is not None else torch.empty(0))


def _plan_digest(plan: Plan) -> str:
    code, tensors = pack(plan)
    return _digest({"code": code}, **tensors)


def _is_own(value: object) -> bool:
    """Whether the class of a value belongs to this package."""
    return type(value).__module__.partition(".")[0] == __name__.partition(".")[0]


def _digest(about: Mapping[str, Any], **tensors: Tensor) -> str:
    """A hash of a JSON-ready mapping and of tensors, by name, dtype, shape and bytes."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"\n{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(bytes_of(value))
    return digest.hexdigest()[:24]
