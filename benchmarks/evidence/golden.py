"""Recorded runs of public samplers, repeated with the solvers of the library.

An *entry* is the record of one run of a public sampler on a model in closed form, as a JSON object: sampler, options, grid,
noise levels of the evaluations, and states (``tests/data/README.md`` describes the fields). :func:`run` repeats an entry with
the solver, the options and the grid that :func:`case_for` reads from its fields, never from its name or its results.

>>> from evidence import golden
>>> grid = {"t": [1.0, 0.5, 0.0], "alpha": [1.0, 1.0, 1.0], "sigma": [1.0, 0.5, 0.0]}
>>> entry = {"solver": "heun", "options": {}, "schedule": "edm", "state_space": "ve", "prediction": "x0"}
>>> entry |= {"status": "ok", "grid": grid, "x_T": [[0.3, -0.2]]}
>>> golden.describe(entry)
'heun on EDM, 1 to 0 in 2 steps'
>>> states, nfe = golden.run(entry, {"shape": [2], "weights": [1.0], "means": [[0.0, 0.0]], "stds": [[1.0, 1.0]]})
>>> nfe
3
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from iia_ode.denoisers.thresholding import dynamic_thresholding
from iia_ode.errors import IIAError, InputError
from iia_ode.ode import ProbabilityFlowODE
from iia_ode.plan import Plan
from iia_ode.problems import Mixture, Problem
from iia_ode.solvers import (
    BlockDPMSolver,
    LowerOrderFinal,
    MetaSolver,
    OrderRamp,
    SinglestepDPMSolver,
    Solver,
    get_solver,
)

from .entries import (
    Entry,
    Level,
    Options,
    choice,
    ddpm,
    field,
    first_of,
    grid_for,
    levels,
    same_level,
    schedule_for,
    stands_still,
)
from .upstream import (
    DDIMAsInDiffusers,
    FPNDMAsInDiffusers,
    FPNDMAtIntegerTimes,
    IPNDMDropsFirstEstimate,
    IPNDMvAsPublished,
    ModelAtOtherLevels,
    TabulatedAdams,
)

__all__ = [
    "Case",
    "Entry",
    "as_problem",
    "case_for",
    "describe",
    "grid_for",
    "run",
    "schedule_for",
    "solver_for",
    "uncovered",
]

_F64 = torch.float64
_PREDICTIONS = {"x0": "data", "epsilon": "noise", "v": "v", "flow": "velocity", "edm_F": "data"}
_SOLVER_TYPES = {"dpmsolver": "midpoint", "midpoint": "midpoint", "taylor": "taylor", "heun": "taylor"}
_SPACINGS = {"logSNR": "log_snr", "time_uniform": "time"}
_NOT_REPEATED = ("eta", "S_churn", "afs", "denoise_to_zero", "clip_sample", "thresholding")


@dataclass(frozen=True)
class Case:
    """What repeats an entry.

    Attributes
    ----------
    solver : with its options.
    plan : the solver on the entry's schedule and grid.
    prediction : what the model answers.
    thresholded : whether its data estimates are dynamically thresholded.
    levels : alpha and sigma of the model at every evaluation, where they are not those of the solver's times.
    idle : whether upstream ends with a step of length zero, which costs an evaluation and moves nothing. That is no step
        here: the grid is without it, and the evaluation is made for nothing, as upstream makes it.
    """

    solver: Solver
    plan: Plan
    prediction: str
    thresholded: bool = False
    levels: tuple[Level, ...] | None = None
    idle: bool = False

    def __post_init__(self) -> None:
        if self.levels is not None and (
            len(self.levels) != self.plan.nfe or self.thresholded or self.prediction != "noise"
        ):
            raise InputError(
                f"a model at other levels needs a level for each of {self.plan.nfe} evaluations, noise prediction and no "
                f"threshold; got {len(self.levels)} levels and {self.prediction} prediction."
            )

    @property
    def nfe(self) -> int:
        """Evaluations, the idle one included."""
        return self.plan.nfe + self.idle

    def ode(self, problem: Problem) -> ProbabilityFlowODE:
        """The problem's ODE with the model as the entry had it."""
        if self.levels is not None:
            levels_at = dict(zip(self.plan.evaluation_times, self.levels, strict=True))
            return ProbabilityFlowODE(ModelAtOtherLevels(problem, levels_at), self.plan.schedule, "noise")
        ode = problem.ode(self.plan.schedule, self.prediction)
        return dynamic_thresholding(ode) if self.thresholded else ode

    def __str__(self) -> str:
        grid, steps = self.plan.grid, self.plan.steps
        remarks = [
            ", data estimates thresholded" * self.thresholded,
            ", model at the levels of `evals`" * (self.levels is not None),
            ", one evaluation more at the end" * self.idle,
        ]
        where = f"{type(self.plan.schedule).__name__}, {grid[0]:g} to {grid[-1]:g} in {steps} step{'s' * (steps > 1)}"
        return f"{_spelt(self.solver)} on {where}{''.join(remarks)}"


def _spelt(solver: Solver) -> str:
    """The label, with the base of a meta-solver even where it is the default."""
    if not isinstance(solver, MetaSolver):
        return solver.label
    others = [f", {k}={v}" for k, v in solver.options().items() if k != "base"]
    return f"{solver.name}({solver.solver.label}{''.join(others)})"


def run(entry: Entry, problem: Problem | Mapping[str, Any]) -> tuple[Tensor, int]:
    """Repeat an entry on a problem.

    Parameters
    ----------
    entry : one run of a public sampler; its results, if it has any, are not read.
    problem : a :class:`~iia_ode.problems.Problem`, or the mixture as a mapping with ``weights``, ``means``, ``stds`` and
        ``shape``.

    Returns
    -------
    The states at all points of the entry's grid, float64 [N + 1, batch, dim] with samples flattened as in the entry, and the
    counted model evaluations.

    Raises
    ------
    InputError : the entry's method, or one of its options, does not exist here, or its states do not fit the problem.
    """
    case, model = case_for(entry), as_problem(problem)
    x = torch.tensor(field(entry, "x_T"), dtype=_F64, device="cpu")
    if x.ndim < 2 or x[0].numel() != math.prod(model.shape):
        raise InputError(f"x_T has shape {list(x.shape)}, and samples of the problem have {list(model.shape)}.")
    ode = case.ode(model)
    with torch.no_grad(), ode.counting() as spent:
        states = case.plan.run(ode, x.reshape(-1, *model.shape), trajectory=True)
        if case.idle:
            ode.output(states[-1], case.plan.grid[-1])
            states = torch.cat([states, states[-1:]])
    return states.flatten(2), spent.evaluations


def as_problem(problem: Problem | Mapping[str, Any]) -> Problem:
    """The problem itself, or the mixture that a mapping describes (``weights`` [K], ``means`` and ``stds`` [K, dim])."""
    if isinstance(problem, Problem):
        return problem
    shape = field(problem, "shape")
    means, stds = (torch.tensor(field(problem, key), dtype=_F64).reshape(-1, *shape) for key in ("means", "stds"))
    return Mixture(torch.tensor(field(problem, "weights"), dtype=_F64), means, stds)


def case_for(entry: Entry) -> Case:
    """What repeats the entry: solver with options, schedule, grid and model.

    Raises
    ------
    InputError : the method, an option, the schedule or the prediction type does not exist here; says which.
    """
    prediction = choice(_PREDICTIONS, "prediction", field(entry, "prediction"))
    solver = solver_for(entry)
    return Case(
        solver,
        solver.plan(schedule_for(entry), grid_for(entry)),
        prediction,
        thresholded=bool(field(entry, "options").get("dynamic_thresholding")),
        levels=levels(field(entry, "evals")) if entry.get("status") == "upstream quirk" else None,
        idle=stands_still(levels(field(entry, "grid"))),
    )


def describe(entry: Entry) -> str:
    """One line: solver with options, schedule, grid, and what is special about the model."""
    return str(case_for(entry))


def uncovered(entry: Entry) -> str | None:
    """Why the entry cannot be repeated here, or None if it can."""
    try:
        case_for(entry)
    except IIAError as error:
        return str(error)
    return None


# ---- solver ----------------------------------------------------------------------------------------------------------


def solver_for(entry: Entry) -> Solver:
    """The solver that repeats the entry's.

    Raises
    ------
    InputError : there is none, or none with these options.
    """
    label, options = field(entry, "solver"), field(entry, "options")
    for option in _NOT_REPEATED:
        if options.get(option):
            raise InputError(f"{option} = {options[option]!r} is not repeated here, only samplers without it.")
    family = str(label).removesuffix("_ancestral")
    family = family if family in _FAMILIES else family.split("-")[0]
    return choice(_FAMILIES, "solver", family)(entry, options)


def _ddim(entry: Entry, options: Options) -> Solver:
    """DDIM, or diffusers' where its steps end elsewhere than on the grid."""
    ends = levels(field(entry, "grid"))[1:]
    targets = levels(entry["step_targets"]) if "step_targets" in entry else ends
    if all(same_level(target, end) for target, end in zip(targets, ends, strict=True)):
        return get_solver("ddim")
    stride = len(ddpm().alphas_cumprod) // field(options, "num_inference_steps")
    return DDIMAsInDiffusers(stride, bool(field(options, "set_alpha_to_one")))


def _dpm_solver(entry: Entry, options: Options) -> Solver:
    """DPM-Solver on the noise or (++) the data: multistep, singlestep, or over blocks of the grid."""
    order = first_of(options, "order", "solver_order")
    form = "data" if entry["solver"].endswith("++") else "noise"
    if "order_list" in entry:
        return _blocks(entry, order, form)
    method = options.get("method", "multistep")
    common = {"form": form, "solver_type": _solver_type(options)}
    if method in ("singlestep", "singlestep_fixed"):
        spacing = choice(_SPACINGS, "skip_type", field(options, "skip_type"))
        return _with_orders(get_solver("dpmpp_2s", max_order=order, spacing=spacing, **common), entry)
    if method != "multistep":
        raise InputError(f"no solver here repeats the method {method!r} of {entry['solver']}.")
    return _multistep_dpm_solver(entry, order, **common)


def _multistep_dpm_solver(entry: Entry, order: int, **options: str) -> Solver:
    return get_solver("ddim") if order == 1 else _with_orders(get_solver("dpmpp_2m", max_order=order, **options), entry)


def _blocks(entry: Entry, order: int, form: str) -> Solver:
    """The block solver whose positions are the entry's; the step to sigma = 0 is one of first order whatever it is called."""
    positions, steps = list(entry["order_list"]), len(entry["order_list"])
    compared = steps - 1 if entry["grid"]["sigma"][-1] == 0 else steps
    asked = bool(field(entry, "options").get("lower_order_final"))  # upstream may overrule it
    for solver in (BlockDPMSolver(order, asked), BlockDPMSolver(order, not asked)):
        if form == "data" and solver.positions(steps)[:compared] == positions[:compared]:
            return solver
    raise InputError(f"no block solver here on {form} of order {order} has the positions {positions}.")


def _unipc(entry: Entry, options: Options) -> Solver:
    form = "data" if field(options, "predict_x0") else "noise"
    variant = options.get("variant", options.get("solver_type"))
    order = first_of(options, "order", "max_order", "solver_order")
    return _with_orders(get_solver("unipc", max_order=order, form=form, variant=variant), entry)


def _ipndm(entry: Entry, options: Options) -> Solver:
    order = options.get("max_order", 4)
    starts_at_noise = entry["grid"]["alpha"][0] == 0
    return IPNDMDropsFirstEstimate(order) if starts_at_noise else get_solver("ipndm", max_order=order)


def _deis(entry: Entry, options: Options) -> Solver:
    """The tabulated weights where the entry has them, else polynomials in log(sigma/alpha)."""
    if "deis_coefficients" in entry:
        return TabulatedAdams(tuple(tuple(row) for row in entry["deis_coefficients"]))
    if options.get("solver_type") != "logrho":
        raise InputError(f"DEIS without coefficients is repeated in log-rho, got {options.get('solver_type')!r}.")
    return _with_orders(get_solver("deis_lab2", max_order=first_of(options, "solver_order", "max_order")), entry)


def _runge_kutta_start(entry: Entry, rounded: type[FPNDMAtIntegerTimes]) -> Solver:
    """F-PNDM, or the variant for grids on which the middle of one of the first steps is no timestep."""
    solver = get_solver("fpndm")
    start = grid_for(entry)[: solver.options()["max_order"]]
    middles = (start[1:] + start[:-1]) / 2
    return solver if torch.equal(middles, middles.round()) else rounded()


_FAMILIES: dict[str, Callable[[Entry, Options], Solver]] = {
    "euler": lambda entry, options: get_solver("euler"),
    "heun": lambda entry, options: get_solver("heun"),
    "ddim": _ddim,
    "DDIM": _ddim,
    "dpm_2": lambda entry, options: get_solver("dpm2", r=options.get("r", 0.5)),
    "lms": lambda entry, options: get_solver("lms", max_order=field(options, "order")),
    "dpmpp_2s": lambda entry, options: get_solver("dpmpp_2s"),
    "dpmpp_2m": lambda entry, options: get_solver("dpmpp_2m"),
    "dpmpp_2m_sde": lambda entry, options: get_solver("dpmpp_2m", solver_type=_solver_type(options)),
    "dpmpp_3m_sde": lambda entry, options: get_solver("dpmpp_3m", solver_type="taylor"),
    "dpmsolver": _dpm_solver,
    "dpmsolver++": _dpm_solver,
    "dpmpp": lambda entry, options: _multistep_dpm_solver(
        entry, field(options, "max_order"), form="data" if field(options, "predict_x0") else "noise"
    ),
    "unipc": _unipc,
    "ipndm": _ipndm,
    # Up to order 2 the published weights are right.
    "ipndm_v": lambda entry, options: (
        get_solver("lms", max_order=options["max_order"])
        if field(options, "max_order") < 3
        else IPNDMvAsPublished(max_order=options["max_order"])
    ),
    "deis": _deis,
    "pndm": lambda entry, options: (
        get_solver("plms") if field(options, "skip_prk_steps") else _runge_kutta_start(entry, FPNDMAsInDiffusers)
    ),
    "S-PNDM": lambda entry, options: get_solver("spndm"),
    "F-PNDM": lambda entry, options: _runge_kutta_start(entry, FPNDMAtIntegerTimes),
}


def _with_orders(base: Solver, entry: Entry) -> Solver:
    """The base, under a meta-solver where the entry's orders are not those that the base takes by itself."""
    orders, top = entry.get("step_orders"), base.options()["max_order"]
    if orders is None:
        return base
    n = len(orders)
    own = [top if isinstance(base, SinglestepDPMSolver) else min(i + 1, top) for i in range(n)]
    if orders == own:
        return base
    if orders == [min(order, n - i) for i, order in enumerate(own)]:
        return LowerOrderFinal(base)
    return OrderRamp(base, tuple(orders))


def _solver_type(options: Options) -> str:
    return choice(_SOLVER_TYPES, "solver_type", options.get("solver_type", "midpoint"))
