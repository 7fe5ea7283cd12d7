"""`sample_many`: a sample for each seed, in files, by one process or many, over any number of interruptions."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm

from ..checks import check_choice, check_shape, check_whole
from ..errors import GridError, InputError, MismatchError, one_run
from ..files import as_path, bytes_of, to_json
from ..iia import FittedSolver
from ..integrate import fixed_method
from ..noise import MOST, seeded_noise
from ..ode import ProbabilityFlowODE
from ..ode.distributed import ranks_of
from ..ode.origin import Origin
from ..plan import Plan, check_grid, check_ode, check_start, traced
from ..plan.storing import pack
from ..solvers import Solver
from .claims import Claims, claims_on
from .conditions import Conditions, Given, conditions_of
from .folder import Folder, check_manifest, load_pillow

__all__ = ["Samples", "sample_many"]

_PAUSE = 0.2  # seconds between two looks at the work of other processes


@dataclass(frozen=True)
class Samples:
    """The result of :func:`iia_ode.sample_many`.

    Attributes
    ----------
    folder : folder of the samples, for :func:`iia_ode.many.read_samples`.
    paths : the files, in the order of the seeds; every file exists.
    made : number of samples that this call made; other processes and earlier calls made the others.
    """

    folder: Path
    paths: tuple[Path, ...]
    made: int


@one_run()
def sample_many(
    ode: ProbabilityFlowODE,
    solver: str | Solver | FittedSolver | Plan,
    seeds: Iterable[int],
    shape: tuple[int, ...],
    out: str | os.PathLike[str],
    conditions: Given = None,
    *,
    grid: Tensor | None = None,
    batch: int = 64,
    format: str = "safetensors",
    decode: Callable[[Tensor], Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Samples:
    """Draw a sample for each seed and write the samples to a folder. A second call goes on where a stopped call ended.

    Sample k starts from ``sigma * seeded_noise([seeds[k]], shape)``, with the sigma of the first time of the grid. The noise
    depends on the seed alone. Batch k holds the seeds from ``k * batch`` on, in every process and after every interruption.
    An interrupted run therefore ends with the same bits as an undisturbed one, on one kind of machine with one number of
    threads.

    Any number of processes may work on one folder, also on several machines with a common file system. A batch is made by one
    process at a time: a lock of the operating system marks the batch, and ends with the process. The ranks of ``torchrun`` and
    ``accelerate launch`` (``torch.distributed``, or RANK and WORLD_SIZE) begin with a share each, and then help others.
    Where the file system has no locks, each rank makes its share only. A process holds one batch in memory.

    Parameters
    ----------
    ode : the model with its schedule. With several processes, the model of each process is on a device of its own.
    solver : a registered name, a :class:`~iia_ode.Solver`, a fitted solver or a plan.
    seeds : seeds of the samples, different whole numbers from 0 to below 2**32, such as ``range(50_000)``.
    shape : shape of one sample.
    out : folder of the samples. The folder gets a ``manifest.json`` that describes the run. Of a function of conditions, the
        manifest has the values for the first and the last seed; of `decode`, the name.
    conditions : conditions by name, tensors [len(seeds), ...] or lists of texts, where entry k belongs to ``seeds[k]``; a
        tensor, if the ODE has a single condition; or a function from a seed to the conditions of one sample by name, tensors
        without batch axis, numbers or texts. The ODE keeps its own conditions for names without a given value. If these
        conditions or the guidance scale have len(seeds) entries, entry k belongs to ``seeds[k]``.
    grid : float64 [N + 1] times; omitted for a fitted solver or a plan.
    batch : samples per model call.
    format : ``"safetensors"``, a file per batch with tensors ``samples`` and ``seeds``; or ``"png"``, a file per sample with
        the seed as name, for images [1 or 3, H, W] in [-1, 1].
    decode : function from final states [b, ...] to the samples [b, ...] to be written, such as the decoder of latents.
    dtype : dtype of the states, float32 or float64.
    device : device of the states; by default the device of the model.
    progress : show a bar over the samples.

    Returns
    -------
    Folder and files. All samples exist when the function returns, unless the file system has no locks.

    Raises
    ------
    InputError, GridError, UnknownNameError : an argument is not usable.
    MismatchError : the folder has the samples of another run, or the solver was made for another ODE.
    MissingDependencyError : PNG files without Pillow.
    NonFiniteError : the model or the result is not finite.
    OSError : a file cannot be written.

    Examples
    --------
    >>> iia.sample_many(ode, fit, range(50_000), (3, 32, 32), "samples", lambda seed: {"class_labels": seed % 10})
    """
    check_ode(ode)
    if ranks_of(ode) is not None:
        raise InputError(
            "sample_many shares the samples among processes itself: pass the ODE without iia_ode.distributed."
        )
    size, batch = check_shape("shape", shape), check_whole("batch", batch, least=1)
    check_choice("format", format, ("safetensors", "png"))
    if format == "png":
        load_pillow()
    numbers = _checked(seeds)
    plan, whole = _plan_of(ode, solver, grid), conditions_of(ode, conditions, numbers)
    place = torch.device(device) if device is not None else ode.device or torch.device("cpu")
    noise = _Noise(plan, size, dtype, place)
    first = whole.at(slice(0, 1))
    check_start(first, noise(numbers[:1]))
    if isinstance(solver, FittedSolver):
        solver.check(first, noise(numbers[:1]))
    folder = as_path(out)
    folder.mkdir(parents=True, exist_ok=True)
    files = Folder(folder, numbers, batch, format == "png")
    run = _account(plan, whole, size, batch, format, decode, dtype)
    names = [name for k in range(files.batches) for name in files.names(k)]

    def make(k: int) -> None:
        rows = files.rows(k)
        final = plan.run(whole.at(rows), noise(numbers[rows]))
        files.write(k, _decoded(final, decode, rows).cpu(), run["id"])

    with claims_on(folder) as claims, torch.no_grad():
        with claims.waiting(files.batches):
            check_manifest(folder, run, names)
        with tqdm(total=len(numbers), desc="samples", unit=" samples", disable=not progress) as bar:
            made = _share(files, claims, make, bar.update)
        if claims.work:
            files.tidy()
    return Samples(folder, tuple(folder / name for name in names), made)


def _share(files: Folder, claims: Claims, make: Callable[[int], None], seen: Callable[[int], object]) -> int:
    """Make the batches that no other process makes, until all files exist; return the number of samples made."""
    rank, size = _rank()
    made, left = 0, sorted(range(files.batches), key=lambda k: k % size != rank)  # the own share first
    while left:
        waiting = []
        for k in left:
            rows = files.rows(k)
            if files.missing(k):
                if not claims.work and k % size != rank:
                    continue  # without locks, nobody else may make the batch
                if not claims.take(k):
                    waiting.append(k)
                    continue
                try:
                    if files.missing(k):  # another process may have written the batch since
                        make(k)
                        made += rows.stop - rows.start
                finally:
                    claims.release(k)
            seen(rows.stop - rows.start)
        if waiting:
            time.sleep(_PAUSE)
        left = waiting
    return made


def _rank() -> tuple[int, int]:
    """Number of this process among the processes of a launcher, and their count; (0, 1) without a launcher."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    found = [os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))]
    if not all(text.isdecimal() for text in found) or int(found[0]) >= int(found[1]):
        raise InputError(
            "RANK and WORLD_SIZE must be the number of a process and the count of processes, got "
            f"{found[0]!r} and {found[1]!r}."
        )
    return int(found[0]), int(found[1])


# ---- arguments -------------------------------------------------------------------------------------------------------


def _checked(seeds: object) -> list[int]:
    if not isinstance(seeds, Iterable):
        raise InputError(f"seeds must be whole numbers, such as range(50_000), got {seeds!r}.")
    numbers = [check_whole("a seed", seed, least=0, below=MOST) for seed in seeds]
    if not numbers:
        raise InputError("seeds is empty: give at least one seed, such as range(64).")
    (most, count), *_ = Counter(numbers).most_common(1)
    if count > 1:
        raise InputError(
            f"seeds must differ, and seed {most} occurs more than once: equal seeds under several conditions go into a folder "
            "for each."
        )
    return numbers


def _plan_of(ode: ProbabilityFlowODE, solver: object, grid: Tensor | None) -> Plan:
    """The plan of a solver on the ODE's schedule and the grid."""
    method = fixed_method(solver)
    if isinstance(method, Solver):
        if grid is None:
            raise GridError(f"solver {method.label!r} needs a grid, such as grid=iia_ode.grids.karras(10).")
        return traced(method, ode.schedule, grid)
    plan = method.plan if isinstance(method, FittedSolver) else method
    if grid is not None and check_grid(plan.schedule, grid) != list(plan.grid):
        raise MismatchError(f"{plan.name} has its own grid of {len(plan.grid)} times: omit grid=.")
    return plan


@dataclass(frozen=True)
class _Noise:
    """Initial states from seeds."""

    plan: Plan
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def __call__(self, seeds: list[int]) -> Tensor:
        """States [len(seeds), ...] at the first time of the grid."""
        level = self.plan.schedule.sigma(self.plan.grid[0])
        return level * seeded_noise(seeds, self.shape, dtype=self.dtype, device=self.device)


def _decoded(final: Tensor, decode: Callable[[Tensor], Tensor] | None, rows: slice) -> Tensor:
    if decode is None:
        return final
    found = decode(final)
    count = rows.stop - rows.start
    if not isinstance(found, Tensor) or len(found) != count:
        got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InputError(f"decode must return a tensor with the {count} samples of its argument, got {got}.")
    return found.detach()


def _account(
    plan: Plan,
    whole: Conditions,
    shape: tuple[int, ...],
    batch: int,
    format: str,
    decode: Callable[[Tensor], Tensor] | None,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Everything that determines the samples of a run, JSON-ready, and its hash under ``"id"``."""
    code, tensors = pack(plan)
    weights = hashlib.sha256(json.dumps(code).encode())
    for name, value in sorted(tensors.items()):
        weights.update(f"{name} {list(value.shape)}".encode())
        weights.update(bytes_of(value))
    seeds = torch.tensor(whole.seeds, dtype=torch.int64, device="cpu")
    origin = to_json(Origin.of(whole.ode, torch.empty((1, *shape), dtype=dtype, device="cpu")))
    own = ("fingerprint", "conditioning", "state_shape", "state_dtype", "serves")
    run: dict[str, Any] = {
        "solver": plan.name,
        "grid": list(plan.grid),
        "weights": weights.hexdigest()[:16],
        **{key: value for key, value in origin.items() if key not in own},
        "model": origin["fingerprint"],
        "conditions": whole.digest(),
        "seeds": {
            "count": len(seeds),
            "first": whole.seeds[0],
            "last": whole.seeds[-1],
            "hash": hashlib.sha256(bytes_of(seeds)).hexdigest()[:16],
        },
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "batch": batch,
        "format": format,
        "decode": None if decode is None else str(getattr(decode, "__qualname__", type(decode).__name__)),
    }
    identity = {
        key: value for key, value in run.items() if key != "model"
    }  # unknown in one process, a model may be known in another
    return {**run, "id": hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]}
