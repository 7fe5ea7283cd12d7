"""Candidate directions: which vectors IIA may add to a step, in the paper's three versions and over a window.

Every set is written as base + correction: zero corrections leave the base solver exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from ..errors import InputError, unknown_name
from ..forms import Evaluation
from ..plan import Bands, LinearMap, Projections, Vector
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
    """What a traced step of the base solver did; what `terms` are made of.

    Attributes
    ----------
    index, t, s : the interval.
    x : the state at t.
    evaluations : those that the base made in this step, in order; each readable in every form.
    start : the evaluation at (x, t), whichever step made it; None if there was none.
    to_data : whether s is the data (sigma = 0). The paper leaves that step alone, and so do its terms.
    base : the base's own result.
    own : the fitted result without its history terms (equal to `base` while this step is being fitted).
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
    """One candidate direction.

    Parameters
    ----------
    symbol : the paper's name of its coefficient; that coefficient is ``base + unit * correction``.
    direction : the vector that a correction multiplies.
    base : value of the paper's coefficient that recovers the base solver.
    unit : change of the paper's coefficient per unit of correction.
    history : whether it comes from earlier steps.
    """

    symbol: str
    direction: Vector
    base: float = 0.0
    unit: float = 1.0
    history: bool = False


Terms: TypeAlias = Callable[[StepRecord, tuple[StepRecord, ...]], tuple[Term, ...]]
"""From the current step and up to `history` earlier ones, newest first, to the directions; ``()`` leaves the step alone."""


def bi_iia_edm(step: StepRecord, earlier: tuple[StepRecord, ...]) -> tuple[Term, ...]:
    """BIIA: z + sum_k gamma_k h Delta_{i-k}, Delta the base's own mean slopes [Zhang et al. 2024, eq. 11-14, alg. 1].

    For Heun, Delta_{i-k} = (d_{i-k} + d'_{i-k+1|i-k}) / 2. The base is gamma = (1, 0, ...).
    """
    if step.to_data:
        return ()
    terms = [Term("gamma_0", step.base - step.x, base=1.0)]
    for k, past in enumerate(earlier, start=1):
        terms.append(Term(f"gamma_{k}", step.h / past.h * (past.base - past.x), history=True))
    return tuple(terms)


def iia_edm(step: StepRecord, earlier: tuple[StepRecord, ...]) -> tuple[Term, ...]:
    """IIA-EDM over Heun: the two halves of its update, and earlier fitted updates [Zhang et al. 2024, eq. 15-19, lemma 1].

    z + h [beta_0 (z - D_i) - beta_1 / (2 t_{i+1}) (D(z~) - D_i) + sum_k gamma_k Delta~_{i-k}], where Delta~ is the fitted
    combination of an earlier step without that step's own history. Written on slopes, the bracket is
    beta_0 t_i d_i + beta_1 (d' - d_i) / 2, which serves every schedule; the base is beta = (1/t_i, 1), gamma = 0
    (on another schedule than EDM 1/t stands for d log sigma / dt).
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
    unit = schedule.sigma_prime(step.t) / schedule.sigma(step.t)
    terms = [
        Term("beta_0", step.h * first, base=unit, unit=unit),
        Term("beta_1", step.h / 2 * (second - first), base=1.0),
    ]
    for k, past in enumerate(earlier, start=1):
        terms.append(Term(f"gamma_{k}", step.h / past.h * (past.own - past.x), history=True))
    return tuple(terms)


def iia_ddim(step: StepRecord, earlier: tuple[StepRecord, ...]) -> tuple[Term, ...]:
    """IIA-DDIM: Phi + phi_0 (x^_i - x^_{i-1}) + phi_1 (eps_i - eps_{i-1}), from i = 1 [Zhang et al. 2024, eq. 20-23].

    With a longer history, the differences further back follow as phi_2, phi_3, ... The base is phi = 0.
    """
    terms: list[Term] = []
    chain = [] if step.to_data else [record.start for record in (step, *earlier)]
    for a, b in zip(chain, chain[1:], strict=False):
        if a is None or b is None:
            raise InputError("the terms of iia-ddim need a base that evaluates the model at the start of each step.")
        k = len(terms)
        terms.append(Term(f"phi_{k}", a.data - b.data, history=True))
        terms.append(Term(f"phi_{k + 1}", a.noise - b.noise, history=True))
    return tuple(terms)


def window(step: StepRecord, earlier: tuple[StepRecord, ...]) -> tuple[Term, ...]:
    """Everything that the step and the earlier ones know: states z, and data estimates D of every evaluation.

    The state at the start of each step and the data form of each evaluation there and of its stages, as plain vectors on
    top of the base. Serves any base and fits every step, that to the data included. On isotropic Gaussian data z_i and
    D_i span the exact step. Stages are numbered: ``D[i].1`` is the second evaluation of step i.
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
    """The directions of ``terms="window"``, each split by an orthogonal decomposition of the sample.

    A set of terms for :class:`~iia_ode.IIA`, as ``IIA("ddim", terms=Window(bands=4, channels="luma-chroma"))``. Scalar
    weights span one operator per direction, these one per direction and group: still linear, and fitted in closed form. With
    one band and no channels it is the plain window. The base's own weights must be numbers, or maps over the same
    decomposition.

    Parameters
    ----------
    bands, channels, axes : of :class:`~iia_ode.plan.Bands`.
    shape : of one sample; by default that of the samples that are fitted to.
    maps : a decomposition of the user's own, in the place of all that: orthogonal projections that sum to the identity, such
        as :class:`~iia_ode.plan.Matrices`. A weight is then a number for each of them.
    history : how many earlier steps are used, at most as many as the fit's own `history`.
    states : how many earlier states are used, at most as many as steps; None is all of them.

    Raises
    ------
    InputError : options that do not fit together.
    """

    bands: int | str = 1
    channels: str | Tensor | None = None
    shape: tuple[int, ...] | None = None
    maps: Projections | None = None
    history: int | None = None
    states: int | None = None
    axes: int | None = None

    def __post_init__(self) -> None:
        for name in ("history", "states"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
                raise InputError(f"{name} is a whole number from 0, or None for all, got {value!r}.")
        if self.bands != "all" and (not isinstance(self.bands, int) or isinstance(self.bands, bool) or self.bands < 1):
            raise InputError(f"bands is a whole number from 1, or 'all', got {self.bands!r}.")
        if self._split and self.maps is not None:
            raise InputError("give bands and channels, or maps, not both.")
        if self.maps is not None and not isinstance(self.maps, Projections):
            raise InputError(f"maps is a decomposition such as Bands or Matrices of iia_ode.plan, got {self.maps!r}.")
        if self.axes is not None and not self._split:
            raise InputError("axes says where bands are taken: give bands or channels with it, or leave it out.")
        if self.shape is not None:
            _ = self.projections

    @property
    def _split(self) -> bool:
        return self.bands != 1 or self.channels is not None

    def for_shape(self, shape: Sequence[int]) -> Window:
        """The same for samples of this shape.

        Raises
        ------
        InputError : it is for samples of another shape, or these cannot be split so.
        """
        own = self.maps.shape if self.maps is not None else self.shape
        if own is not None and tuple(own) != tuple(shape):
            raise InputError(
                f"{self.__name__} is for samples {list(own)}, and these are {list(shape)}: give it none, or maps for these."
            )
        return replace(self, shape=tuple(shape)) if self._split and own is None else self

    @cached_property
    def projections(self) -> Projections | None:
        """The decomposition; None where there is one group only.

        Raises
        ------
        InputError : the shape of one sample is not known yet.
        """
        found = self.maps
        if self._split and self.shape is None:
            raise InputError(
                "a window with bands or channels is for samples of some shape, which IIA.fit sees; outside of a fit give it: "
                "shape=(3, 16, 16)."
            )
        if found is None and self.shape is not None:
            found = Bands(self.shape, self.bands, self.channels, self.axes)
        return None if found is None or found.count == 1 else found

    @property
    def __name__(self) -> str:
        """What reports and files call these terms."""
        if self.maps is not None:
            options = [f"maps={self.maps!r}"]
        else:
            channels = "matrix" if isinstance(self.channels, Tensor) else self.channels
            options = [f"bands={self.bands}"] * (self.bands != 1) + [f"channels={channels}"] * (channels is not None)
        options += [f"{k}={v}" for k in ("history", "states") if (v := getattr(self, k)) is not None]
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
        earlier = earlier if self.history is None else earlier[: self.history]
        plain = window(step, earlier)
        if self.states is not None:
            old = [term for term in plain if term.history and term.symbol.startswith("z")]
            dropped = {id(term) for term in old[self.states :]}
            plain = tuple(term for term in plain if id(term) not in dropped)
        if not self._units:
            return plain
        return tuple(
            Term(f"{term.symbol}[{name}]", term.direction * unit, history=term.history)
            for term in plain
            for name, unit in self._units
        )


PAPER_TERMS: dict[str, Terms] = {"biia-edm": bi_iia_edm, "iia-edm": iia_edm, "iia-ddim": iia_ddim}

_DIFFERENCES = ("ddim", "spndm", "ipndm", "ipndm1", "ipndm2", "ipndm3", "dpmpp_2m")
_OF_BASE = {"heun": "iia-edm", **dict.fromkeys(_DIFFERENCES, "iia-ddim")}


def resolve_terms(terms: str | Terms, base: str) -> tuple[str, Terms]:
    """The name and the function behind a `terms` argument; "paper" is what the paper has for that base."""
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
