"""Candidate directions of a fit: the vectors that a step may add to the base solver's result.

The fitted step is base + sum_j c_j direction_j, so that zero corrections c are the base exactly. The module has the three sets
of the paper, and the window: all available states and data estimates, optionally split by frequency bands and channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from ..checks import check_whole
from ..errors import InputError, unknown_name
from ..forms import Evaluation
from ..plan import Bands, LinearMap, Vector
from ..plan.vectors import is_number, weight_size

__all__ = [
    "PAPER_TERMS",
    "StepRecord",
    "Term",
    "Terms",
    "Window",
    "bi_iia_edm",
    "iia_ddim",
    "iia_edm",
    "resolve_terms",
    "window",
]


@dataclass(frozen=True, eq=False)
class StepRecord:
    """A traced step of the base solver: the material of directions.

    Attributes
    ----------
    index : number of the step, from 0.
    t, s : start and end of the interval.
    x : the state at t.
    evaluations : the evaluations of this step, in order; each is readable in every prediction form.
    start : the evaluation at (x, t), from this step or from an earlier step; None where there is none.
    to_data : whether s is the data (sigma = 0). The paper's terms for EDM are empty for this step.
    base : the base solver's result at s.
    own : the fitted result without its history terms; equal to `base` while the step is being fitted.
    """

    index: int
    t: float
    s: float
    x: Vector
    evaluations: tuple[Evaluation[Vector], ...]
    start: Evaluation[Vector] | None
    to_data: bool
    base: Vector
    own: Vector

    @property
    def h(self) -> float:
        """Signed length of the interval in t."""
        return self.s - self.t


@dataclass(frozen=True, eq=False)
class Term:
    """A candidate direction.

    Parameters
    ----------
    symbol : name of the coefficient, as in the paper. The coefficient is ``base + unit * correction``.
    direction : the vector that is multiplied by the correction.
    base : value of the coefficient at which the step equals the base solver's step.
    unit : change of the coefficient per unit of correction.
    history : whether the direction comes from earlier steps.
    """

    symbol: str
    direction: Vector
    base: float = 0.0
    unit: float = 1.0
    history: bool = False


Terms: TypeAlias = Callable[[StepRecord, tuple[StepRecord, ...]], tuple[Term, ...]]
"""A function from the current step, and up to `history` earlier steps with the newest first, to the directions of the step.
A step without directions keeps the base."""


def bi_iia_edm(step: StepRecord, earlier: tuple[StepRecord, ...]) -> tuple[Term, ...]:
    """BIIA: z + sum_k gamma_k h Delta_{i-k} [Zhang et al. 2024, eq. 11-14, alg. 1].

    The step to the data has no directions, as in algorithm 1. Delta is the mean slope of a base step; for Heun,
    Delta_{i-k} = (d_{i-k} + d'_{i-k+1|i-k}) / 2. The base is gamma = (1, 0, ...).
    """
    if step.to_data:
        return ()
    terms = [Term("gamma_0", step.base - step.x, base=1.0)]
    for k, past in enumerate(earlier, start=1):
        terms.append(Term(f"gamma_{k}", step.h / past.h * (past.base - past.x), history=True))
    return tuple(terms)


def iia_edm(step: StepRecord, earlier: tuple[StepRecord, ...]) -> tuple[Term, ...]:
    """IIA-EDM: the two halves of Heun's update, and earlier fitted updates [Zhang et al. 2024, eq. 15-19, lemma 1].

    The step is z + h [beta_0 (z - D_i) - beta_1 / (2 t_{i+1}) (D(z~) - D_i) + sum_k gamma_k Delta~_{i-k}], with Delta~ the
    fitted combination of an earlier step without the history terms of that step. On slopes, the first two terms are
    beta_0 t_i d_i + beta_1 (d' - d_i) / 2, a form for every schedule. The base is beta = (1/t_i, 1), gamma = 0; on a
    schedule other than EDM, 1/t stands for d log sigma / dt.

    Raises
    ------
    InputError : the step of the base is not Heun's.
    """
    if step.to_data:
        return ()
    slopes = [e.velocity for e in step.evaluations]
    heun = step.x + step.h / 2 * (slopes[0] + slopes[1]) if len(slopes) == 2 else None
    if heun is None or any(weight_size(w) > 1e-9 * abs(step.h) for w in (heun - step.base).weights.values()):
        raise InputError(
            f"the terms of iia-edm are the two halves of Heun's step, and step {step.index} of this base is no such step: "
            "use base 'heun', or terms='biia-edm', which serves any base."
        )
    first, second = slopes
    schedule = step.evaluations[0].schedule
    sigma = schedule.sigma(step.t)
    unit = schedule.sigma_prime(step.t) / sigma if sigma else 1.0  # from the data the slope itself is the unit
    terms = [
        Term("beta_0", step.h * first, base=unit, unit=unit),
        Term("beta_1", step.h / 2 * (second - first), base=1.0),
    ]
    for k, past in enumerate(earlier, start=1):
        terms.append(Term(f"gamma_{k}", step.h / past.h * (past.own - past.x), history=True))
    return tuple(terms)


def iia_ddim(step: StepRecord, earlier: tuple[StepRecord, ...]) -> tuple[Term, ...]:
    """IIA-DDIM: Phi + phi_0 (x^_i - x^_{i-1}) + phi_1 (eps_i - eps_{i-1}), from i = 1 [Zhang et al. 2024, eq. 20-23].

    The step to the data is fitted like every other step: the equations make no exception. A longer history adds earlier
    differences with coefficients phi_2, phi_3, ... The base is phi = 0.

    Raises
    ------
    InputError : the base does not evaluate the model at the start of each step.
    """
    terms: list[Term] = []
    chain = [record.start for record in (step, *earlier)]
    for a, b in zip(chain, chain[1:], strict=False):
        if a is None or b is None:
            raise InputError("the terms of iia-ddim need a base that evaluates the model at the start of each step.")
        k = len(terms)
        terms.append(Term(f"phi_{k}", a.data - b.data, history=True))
        terms.append(Term(f"phi_{k + 1}", a.noise - b.noise, history=True))
    return tuple(terms)


def window(step: StepRecord, earlier: tuple[StepRecord, ...]) -> tuple[Term, ...]:
    """All states z and data estimates D of the current and the earlier steps.

    The window serves any base and fits every step, the step to the data included. On isotropic Gaussian data, z_i and D_i
    span the exact step. Stages are numbered: ``D[i].1`` is the second evaluation of step i.
    """
    terms: list[Term] = []
    seen: set[object] = set()

    def offer(symbol: str, direction: Vector, history: bool) -> None:
        plain = all(is_number(w) for w in direction.weights.values())
        key = frozenset((j, float(w)) for j, w in direction.weights.items()) if plain else id(direction)
        if key not in seen:
            seen.add(key)
            terms.append(Term(symbol, direction, history=history))

    records = (step, *earlier)
    for k, record in enumerate(records):
        offer(f"z[{_place(k)}]", record.x, k > 0)
    for k, record in enumerate(records):
        start = () if record.start is None else (record.start,)
        stages = tuple(e for e in record.evaluations if e is not record.start)
        for j, evaluation in enumerate((*start, *stages), start=0 if start else 1):
            offer(f"D[{_place(k)}]" + (f".{j}" if j else ""), evaluation.data, k > 0)
    return tuple(terms)


def _place(k: int) -> str:
    return f"i-{k}" if k else "i"


@dataclass(frozen=True, eq=False)
class Window:
    """The directions of ``terms="window"``, each split by frequency bands and channels.

    Scalar weights span a single operator per direction. A split spans an operator per direction and group; the fit stays
    linear and in closed form. The base's own weights must be numbers, or maps over the same decomposition. Example:
    ``IIA("ddim", terms=Window(bands=4, channels="luma-chroma"))``.

    Parameters
    ----------
    bands, channels : of :class:`~iia_ode.plan.Bands`; by default there is a single group, as in the plain window.
    shape : shape of a sample; by default the shape of the samples of the fit.

    Raises
    ------
    InputError : `bands` or `channels` is not usable, or does not go with `shape`.
    """

    bands: int | str = 1
    channels: str | Tensor | None = None
    shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.bands != "all":
            check_whole("bands", self.bands, least=1)
        if self.shape is not None:
            _ = self.projections

    @property
    def _split(self) -> bool:
        return self.bands != 1 or self.channels is not None

    def for_shape(self, shape: Sequence[int]) -> Window:
        """The window for samples of this shape.

        Raises
        ------
        InputError : the window has another shape, or these samples cannot be split.
        """
        if self.shape is not None and tuple(self.shape) != tuple(shape):
            raise InputError(
                f"{self.name} is for samples {list(self.shape)}, and these are {list(shape)}: leave shape= out."
            )
        return replace(self, shape=tuple(shape)) if self._split else self

    @cached_property
    def projections(self) -> Bands | None:
        """The decomposition; None where there is a single group.

        Raises
        ------
        InputError : the shape of a sample is not known yet.
        """
        if self._split and self.shape is None:
            raise InputError(
                "a window with bands or channels needs the shape of a sample, which IIA.fit sees; outside of a fit give "
                "shape=(3, 16, 16), for instance."
            )
        found = None if self.shape is None else Bands(self.shape, self.bands, self.channels)
        return None if found is None or found.count == 1 else found

    @property
    def name(self) -> str:
        """Name of these terms in reports and files."""
        channels = "matrix" if isinstance(self.channels, Tensor) else self.channels
        options = [f"bands={self.bands}"] * (self.bands != 1) + [f"channels={channels}"] * (channels is not None)
        return f"window({', '.join(options)})" if options else "window"

    @cached_property
    def _units(self) -> tuple[tuple[str, LinearMap], ...]:
        p = self.projections
        if p is None:
            return ()
        rows = torch.eye(p.count, dtype=torch.float64, device="cpu")
        return tuple((name, LinearMap(p, row)) for name, row in zip(p.names, rows, strict=True))

    def __call__(self, step: StepRecord, earlier: tuple[StepRecord, ...]) -> tuple[Term, ...]:
        """The directions of a step."""
        plain = window(step, earlier)
        if not self._units:
            return plain
        return tuple(
            Term(f"{term.symbol}[{name}]", term.direction * unit, history=term.history)
            for term in plain
            for name, unit in self._units
        )


PAPER_TERMS: dict[str, Terms] = {"biia-edm": bi_iia_edm, "iia-edm": iia_edm, "iia-ddim": iia_ddim}
"""The sets of the paper, by name."""

_DIFFERENCES = ("ddim", "spndm", "ipndm", "ipndm1", "ipndm2", "ipndm3", "dpmpp_2m")
_OF_BASE = {"heun": "iia-edm", **dict.fromkeys(_DIFFERENCES, "iia-ddim")}


def resolve_terms(terms: str | Terms, base: str) -> tuple[str, Terms]:
    """The name and the function of a `terms` argument; ``"paper"`` is the paper's set for the base of this name.

    Raises
    ------
    InputError : the paper has no terms for this base.
    UnknownNameError : there is no set of this name.
    """
    if isinstance(terms, Window):
        return terms.name, terms
    if callable(terms):
        return getattr(terms, "__name__", type(terms).__name__), terms
    if terms == "paper":
        if base not in _OF_BASE:
            raise InputError(
                f"the paper has no terms for base {base!r} (it has for {', '.join(map(repr, _OF_BASE))}): use "
                "terms='window' or terms='biia-edm', which serve any base, or a function."
            )
        terms = _OF_BASE[base]
    known = {**PAPER_TERMS, "window": window}
    if terms not in known:
        raise unknown_name("set of terms", terms, ["paper", *known])
    return terms, known[terms]
