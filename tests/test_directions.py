"""Directions split by bands and channels: exact where each group has one variance, alone, in a fit and in its file."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import F64, normal
from torch import Tensor

import iia_ode as iia
from iia_ode.iia import LeastSquares, StepRecord, Window
from iia_ode.iia.directions import window
from iia_ode.plan import Bands, LinearMap, Past, Plan, Tracer, Vector
from iia_ode.plan.tracer import take_step
from iia_ode.warm_starts import Moments, WarmStart

SHAPE = (3, 8, 8)
P = Bands(SHAPE, 3, "luma-chroma")
VARIANCES = torch.tensor([4.0, 1.0, 0.1, 2.0, 0.5, 0.05], dtype=F64)


def data(x: Tensor, t: Tensor) -> Tensor:
    """The denoiser of Gaussian data with one variance per band and channel."""
    return LinearMap(P, VARIANCES / (VARIANCES + float(t[0]) ** 2))(x)


ODE = iia.ProbabilityFlowODE(data, iia.EDM())
GRID = torch.tensor([10.0, 3.0, 1.0, 0.0], dtype=F64)


def test_a_fit_with_a_weight_per_band_is_exact_where_each_band_has_one_variance(tmp_path: Path) -> None:
    x, unseen = 10 * normal(24, *SHAPE), 10 * normal(5, *SHAPE, seed=3)
    exact = LinearMap(P, (VARIANCES / (VARIANCES + 100)).sqrt())(unseen)
    errors = {}
    for terms in ("window", Window(3, "luma-chroma", SHAPE)):
        fit = iia.IIA("ddim", terms=terms, target="local").fit(ODE, x, GRID)
        errors[fit.record.terms] = float((iia.sample(ODE, unseen, solver=fit) - exact).abs().max())
    assert list(errors) == ["window", "window(bands=3, channels=luma-chroma)"]
    plain, banded = errors.values()
    assert banded < 1e-2 * plain and banded < 1e-3
    assert "band 1, luma" in fit.table() and fit.explain() and str(fit)
    back = iia.load(fit.save(tmp_path / "fit.safetensors"))
    assert torch.equal(iia.sample(ODE, unseen, solver=back), iia.sample(ODE, unseen, solver=fit))


def test_a_window_takes_its_shape_from_the_samples_and_refuses_those_of_another() -> None:
    x = 10 * normal(24, *SHAPE)
    terms = Window(bands=3, channels="luma-chroma")
    found, known = (iia.IIA("ddim", terms=t).fit(ODE, x, GRID) for t in (terms, Window(3, "luma-chroma", SHAPE)))
    assert found.plan.difference(known.plan) == 0.0
    assert iia.IIA("ddim", terms=terms).fit(ODE, x, GRID).record.terms == known.record.terms
    with pytest.raises(iia.errors.InputError, match="is for samples"):
        iia.IIA("ddim", terms=Window(3, "luma-chroma", (3, 16, 16))).fit(ODE, x, GRID)
    with pytest.raises(iia.errors.InputError, match=r"which IIA\.fit sees"):
        _ = terms.projections


@pytest.mark.parametrize("per", [None, "c"])
def test_a_fit_behind_a_warm_start_is_saved_with_it(tmp_path: Path, per: str | None) -> None:
    labels = torch.arange(24) % 2
    ode = iia.ProbabilityFlowODE(lambda x, t, c: data(x, t), iia.EDM(), conditioning={"c": labels})
    samples, x = normal(24, *SHAPE), 80 * normal(24, *SHAPE, seed=1)
    by = {"labels": labels, "per": per} if per else {}
    warm = WarmStart.gaussian(iia.EDM(), 80.0, 10.0, samples=samples, shrink="dct", **by)
    fit = iia.IIA("ddim", terms="window").fit(ode, warm.apply(x, ode), GRID)
    whole = fit.after(warm)
    assert [r.index for r in whole.reports] == [r.index + 1 for r in fit.reports]
    back = iia.load(whole.save(tmp_path / "warm.safetensors"))
    assert torch.equal(iia.sample(ode, x, solver=back), iia.sample(ode, warm.apply(x, ode), solver=fit))


# ---- the directions of a step ------------------------------------------------------------------------------------------


def record(shape: tuple[int, ...]) -> tuple[Tracer, StepRecord]:
    """The first step of Euler, as a fit sees it."""
    tracer, x = Tracer(iia.EDM()), Vector({0: 1.0})
    y, _ = take_step(iia.get_solver("euler"), tracer, x, 5.0, 1.0, Past())
    return tracer, StepRecord(0, 5.0, 1.0, x, tuple(tracer.evaluations), tracer.known(x, 5.0), False, y, y)


def test_a_window_with_one_band_is_the_plain_window() -> None:
    _, step = record((3, 8, 8))
    assert Window().name == "window"
    plain = window(step, (step,))
    assert [t.symbol for t in Window()(step, (step,))] == [t.symbol for t in plain]
    assert len(Window(channels="luma-chroma", shape=(1, 8, 8))(step, ())) == len(window(step, ()))


def test_a_window_has_a_direction_for_each_vector_and_group() -> None:
    _, step = record((3, 8, 8))
    terms = Window(4, "luma-chroma", shape=(3, 8, 8))
    assert terms.name == "window(bands=4, channels=luma-chroma)"
    found = terms(step, ())
    plain = window(step, ())
    assert len(found) == 8 * len(plain) and found[1].symbol == "z[i][band 2, luma]"
    for i, term in enumerate(plain):
        total = sum((t.direction for t in found[8 * i : 8 * i + 8]), Vector({}))
        parts = {j: w.coefficients.tolist() for j, w in total.weights.items()}
        assert parts == {j: [pytest.approx(w)] * 8 for j, w in term.direction.weights.items()}


def test_a_weight_per_band_takes_one_step_exactly_where_the_gaussian_has_one_variance_per_band() -> None:
    shape, schedule = (3, 8, 8), iia.EDM()
    p = Bands(shape, 3, "luma-chroma")
    moments = Moments(torch.zeros(shape), p, torch.tensor([4.0, 1.0, 0.1, 2.0, 0.5, 0.05], dtype=F64))
    flow = WarmStart.of_moments(moments, schedule, 5.0, 1.0)
    data = LinearMap(p, moments.variances / (moments.variances + 25))
    tracer, step = record(shape)
    x = 5 * normal(20, *shape)
    values = {0: x, 1: (x - data(x)) / 5}  # Euler stores the velocity
    errors = []
    for terms in (Window(), Window(3, "luma-chroma", shape)):
        candidates = terms(step, ())
        columns = [_value(t.direction, values) for t in candidates]
        system = LeastSquares(len(columns))
        system.add(columns, flow.apply(x) - _value(step.base, values))
        fitted = sum((c * t.direction for c, t in zip(system.solve().coefficients, candidates, strict=True)), step.base)
        plan = Plan(schedule, (5.0, 1.0), (tracer.code[0], _combine(fitted)))
        y = plan.run(iia.ProbabilityFlowODE(lambda x, t: data(x), schedule), x)
        errors.append(float((y - flow.apply(x)).abs().max()))
    assert errors[1] < 1e-9 < 1e-2 < errors[0]


def _value(v: Vector, values: dict[int, Tensor]) -> Tensor:
    return sum(w(values[j]) if isinstance(w, LinearMap) else w * values[j] for j, w in v.weights.items())


def _combine(v: Vector) -> Any:
    return iia.plan.Combine(tuple(v.weights.items()), v.constant, step=1)


@pytest.mark.parametrize("options", [{"bands": 0}, {"bands": 2.5}, {"bands": 2, "shape": (2, 2, 2, 2)}])
def test_a_window_that_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(iia.errors.InputError):
        Window(**options)
