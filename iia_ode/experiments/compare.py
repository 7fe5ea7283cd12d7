"""Comparison of solvers by their endpoint error on unseen noise, at equal numbers of evaluations."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from ..autofit import Budget
from ..autofit.budget import budget_of
from ..checks import check_whole
from ..errors import InputError, one_run
from ..files import as_path
from ..ode import ProbabilityFlowODE
from .cells import Options, compared
from .lines import RECIPE, Families, Solvers, families_of, lines_of
from .results import Comparison
from .settings import Setting, get_setting
from .task import of_ode, of_setting

__all__ = ["RECIPE", "compare"]


@one_run()
def compare(
    model: Setting | str | ProbabilityFlowODE,
    solvers: Solvers,
    nfes: int | Sequence[int],
    grids: Families = "karras",
    *,
    x: Tensor | None = None,
    fit_x: Tensor | None = None,
    reference: Tensor | None = None,
    samples: int | None = None,
    fit_samples: int = 200,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    tolerance: float | None = None,
    target: str = "substeps",
    budget: str | Budget = "closed-form",
    guidance_scale: float | None = None,
    seed: int = 0,
    device: str | None = None,
    name: str | None = None,
    repeats: int = 1,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = False,
    report: Callable[[str], None] | None = None,
) -> Comparison:
    r"""Compare solvers: fit them where needed, sample from unseen noise, and measure against an accurate reference.

    Every :class:`~iia_ode.IIA`, every preset and the solver ``"iia"`` is fitted anew for each number of evaluations, on noise
    drawn apart from the noise of the measurement. A :class:`~iia_ode.FittedSolver` or a :class:`~iia_ode.Plan` is used as it
    stands, at its own number of evaluations. Whether the comparison is fair to such a solver depends on the noise of its own
    fit.

    Parameters
    ----------
    model : a setting, the name of a setting, or the ODE of a model of your own with the conditions of `x`.
    solvers : a list of registered names, presets' names, :class:`~iia_ode.Solver` instances, mappings ``{"name": ...,
        "options": ...}``, :class:`~iia_ode.IIA` instances, fitted solvers and plans; or a mapping from your own names to such
        entries. The name ``"iia"`` stands for the solver found by :func:`iia_ode.fit`.
    nfes : numbers of evaluations. A solver is left out where it cannot make the number exactly.
    grids : one or more families of grids: names in :data:`iia_ode.grids.GRIDS`, functions from a number of levels to a grid,
        or a mapping from your own names to such entries. Solvers with grids of their own (``"iia"``, fitted solvers, plans) do
        not use them. All grids start and end at the same levels.
    x : for an ODE: the unseen initial states [B, ...] at the start of the grids, float32 or float64.
    fit_x : for an ODE: initial states [B', ...] for the fits, none of them in `x`. By default `fit_samples` draws of
        ``sigma * randn``. The fits reuse the conditions of `x` evenly.
    reference : for an ODE: accurate final states [B, ...] of `x`; by default a solution by dopri8.
    samples : for a setting: number of unseen initial states, by default 128.
    fit_samples : number of initial states to fit on, where `fit_x` is not given. A `budget` may add more.
    sigma_min, sigma_max : for an ODE: last positive and first level sigma/alpha of the families given by name; by default the
        levels of each family. References and teachers stop at `sigma_min`, or by default at the smallest level of the model. A
        setting has both levels as attributes.
    tolerance : relative and absolute tolerance of the reference; by default the setting's, or 1e-8 for a model in float64 and
        1e-6 else.
    target : target of presets given by name: ``"substeps"`` as in the paper, ``"local"`` or ``"trajectory"``.
    budget : budget of ``"iia"``: ``"closed-form"``, ``"standard"``, ``"thorough"`` or a :class:`~iia_ode.Budget`.
    guidance_scale : for a setting: scale of classifier-free guidance, by default 1, without guidance.
    seed : seed of all draws. The draws for fits and for measurements come from different generators.
    device : for a setting: device of the model, by default ``"cpu"``.
    name : name of an ODE's model in the result; by default the name of its class or function.
    repeats : number of timed runs of each cell after the first run; the row has the median of their seconds. With 0 the first
        run is timed, with the preparations of a first run.
    resume : folder of the study. Every reference and every finished cell is kept there, with its final states and its fit,
        and found again by a later call. A study that was interrupted goes on with the missing cells. The key of a cell covers
        everything that determines the cell: the model by its fingerprint and by its output for two samples, conditions,
        states, schedule, grid, solver, the options and the states of a fit, the reference, the versions of the library and of
        torch, and the hardware. Any number of studies may share a folder. Fits by functions or classes of your own
        (``terms``, ``target``) are made anew each time.
    progress : whether to show a progress bar over the cells of the table.
    report : function called with a line of text at each stage.

    Returns
    -------
    A :class:`Comparison`: rows, states, grids, fits and the conditions.

    Raises
    ------
    UnknownNameError : no such setting, solver, preset, family or budget.
    InputError : an argument is not usable or does not go with the model; the comparison is empty; two lines have one name;
        or `fit_x` and `x` share samples.
    GridError : a family cannot make a grid of two levels, or grids start or end at different levels.
    MismatchError : the folder has another model with the same fingerprint, because the code of the model has changed.
    OSError : the folder cannot be written.

    Warns
    -----
    FingerprintWarning : `resume` is given for a model without weights and without a tag. Nothing is kept, because nothing
        identifies the model.

    Examples
    --------
    >>> result = compare(
    ...     ode, ["heun", iia.IIA("ddim", "window")], [5, 9], ["karras", "log_snr"], x=80.0 * torch.randn(64, 3)
    ... )
    >>> print(result.table())
    >>> result.csv("study.csv")
    >>> print(*result.slopes(least=9), sep="\n")
    """
    counts = _counts(nfes)
    budget_of(budget)  # before the work
    check_whole("seed", seed, least=0, below=2**31)
    check_whole("fit_samples", fit_samples, least=1)
    check_whole("repeats", repeats, least=0)
    if isinstance(model, ProbabilityFlowODE):
        given: dict[str, object] = {"samples": samples, "guidance_scale": guidance_scale, "device": device}
        _refuse(given, "the model is an ODE, which has its own guidance and runs on the states x")
        task = of_ode(model, x, fit_x, reference, sigma_min, tolerance, name)
        families = families_of(grids, model.schedule, sigma_min, sigma_max)
    else:
        setting = get_setting(model) if isinstance(model, str) else model
        if not isinstance(setting, Setting):
            raise InputError(f"compare takes a Setting, the name of a setting or a ProbabilityFlowODE, got {model!r}.")
        given = {"x": x, "fit_x": fit_x, "reference": reference, "name": name}
        given |= {"sigma_min": sigma_min, "sigma_max": sigma_max}
        _refuse(given, "the model is a setting, which has its own levels and draws its own states")
        scale = 1.0 if guidance_scale is None else guidance_scale
        count = check_whole("samples", 128 if samples is None else samples, least=1)
        task = of_setting(setting, count, fit_samples, tolerance, scale, seed, device or "cpu")
        families = families_of(grids, setting.schedule, setting.sigma_min, setting.sigma_max)
    lines = lines_of(solvers, families, target)
    folder = None if resume is None else as_path(resume)
    options = Options(fit_samples, target, budget, seed, repeats, folder, progress, report or (lambda _: None))
    return compared(task, lines, counts, families, options)


def _refuse(given: Mapping[str, object], reason: str) -> None:
    """Raise InputError if an argument was given that does not go with the model."""
    names = [name for name, value in given.items() if value is not None]
    if names:
        raise InputError(f"{reason}: omit {' and '.join(names)}.")


def _counts(nfes: int | Sequence[int]) -> tuple[int, ...]:
    counts = [nfes] if isinstance(nfes, int) else list(nfes)
    if not counts:
        raise InputError("compare needs at least one number of evaluations, such as nfes=[5, 10].")
    return tuple(dict.fromkeys(check_whole("a number of evaluations", n, least=1) for n in counts))
