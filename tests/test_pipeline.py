"""Pipelines of a search: kinds of weights, the fits that are refined, and weights per band of an image."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from fits import REFINED, start_of
from hypothesis import given
from hypothesis import strategies as st
from support import F64, normal

import iia_ode as iia
from iia_ode import IIA, Teacher, fit
from iia_ode.autofit import Pipeline
from iia_ode.autofit.grids import LeapGrid
from iia_ode.autofit.pipeline import SCALARS, Contender, Start, weights_of
from iia_ode.autofit.stages import Context, choose, worth_refining
from iia_ode.iia import Batch, Window
from iia_ode.iia.provenance import StageCost
from iia_ode.plan import Bands

METHOD = IIA("ddim", "window", "trajectory", history=2, guard=False).stepwise((4,))


@pytest.mark.parametrize(("shape", "kinds"), [((5,), 2), ((2, 9), 2), ((1, 8, 8), 4), ((3, 16, 16), 4), ((3, 2, 2), 2)])
def test_bands_are_tried_for_images_only_and_intercepts_for_everything(shape, kinds):
    found = weights_of(shape, intercepts=True)
    assert found[0] is SCALARS and len(found) == kinds
    assert [w.name for w in found if not w.intercept] == [w.name for w in weights_of(shape, intercepts=False)]
    for weights in found:
        assert weights.intercept == weights.name.endswith("intercept")
        assert (weights.groups > 1) == weights.name.startswith("bands")


KINDS = st.sampled_from(["none", "affine", "diagonal", "per class"])


@given(names=st.lists(KINDS, min_size=1, max_size=8), count=st.integers(1, 8))
def test_of_every_kind_the_best_is_refined_where_there_is_room_and_the_best_of_all_always_is(names, count):
    keys = {"none": None, "affine": None, "diagonal": None, "per class": "label"}
    starts = {name: None if name == "none" else Start(name, None, key=key) for name, key in keys.items()}
    fits = [Contender(n, None, torch.ones(1), StageCost(), Pipeline(METHOD, 2, 80.0, starts[n])) for n in names]
    chosen = worth_refining(fits, count)
    assert len(chosen) == min(count, len(fits)) == len({id(c) for c in chosen})
    assert chosen[0] is fits[0]
    assert {c.pipeline.kind[0] for c in chosen} == {c.pipeline.kind[0] for c in fits} or count == 1
    assert {c.pipeline.kind for c in chosen} == {c.pipeline.kind for c in fits} or count < 3
    for kind in {c.pipeline.kind for c in fits}:  # of each kind those that come first
        own, taken = ([c for c in found if c.pipeline.kind == kind] for found in (fits, chosen))
        assert all(a is b for a, b in zip(taken, own, strict=False))


class Judges:
    """Training samples of four components with known errors of two plans."""

    def __init__(self, lost):
        self.x, self.lost = torch.zeros(120, 4), lost

    def __len__(self):
        return len(self.x)

    def errors(self, plan):
        """Small errors, and for the refined plan some of size 1."""
        found = torch.full((120,), 0.01 if plan == "refined" else 0.03, dtype=F64)
        found[: self.lost * (plan == "refined")] = 1.0
        return found


@pytest.mark.parametrize(("lost", "finals", "chosen"), [(0, 0.0, "refined"), (8, 0.0, "closed"), (8, 1.0, "refined")])
def test_samples_that_end_elsewhere_in_training_alone_can_turn_the_choice(lost, finals, chosen):
    pipeline, held = Pipeline(METHOD, 2, 80.0), {"refined": 0.01, "closed": 0.03}
    made = [
        Contender(n, n, torch.full((30,), e, dtype=F64), StageCost(), pipeline, refinement=n == "refined" or None)
        for n, e in held.items()
    ]
    context = SimpleNamespace(train=Judges(lost), nfe=2, budget=replace(REFINED, finals=finals))
    context.ample = partial(Context.ample, context)
    assert choose(context, made).name == chosen


@pytest.mark.parametrize("name", [None, "affine"])
def test_a_pipeline_makes_its_number_of_evaluations_from_the_start_to_the_data(name):
    ode, x = (
        iia.problems.Gaussian(torch.zeros(4, dtype=F64), torch.ones(4, dtype=F64)).ode(iia.EDM()),
        80.0 * normal(20, 4),
    )
    batch = Batch(ode, x, Teacher.solve(ode, x, 80.0, 0.0, steps=20))
    start = None if name is None else Start(name, batch)
    pipeline = Pipeline(METHOD, 3, 80.0, start, LeapGrid(5.0, 0.2))
    times = pipeline.times(ode.schedule)
    assert len(times) == pipeline.levels + 1 == (4 if start is None else 5)
    parts = pipeline.fit(batch)
    assert (parts.warm is None) == (start is None)
    for plan in (parts.plan, pipeline.plan(batch, times)):
        assert plan.nfe == 3 and plan.grid == tuple(times.tolist())
        assert float(batch.errors(plan).max()) < 0.05
    assert parts.fit.plan.nfe == 3  # a warm start costs no evaluation


def test_images_whose_energy_falls_with_frequency_get_weights_per_band_and_survive_their_file(tmp_path):
    """On Gaussian images with a spectrum, weights per band are exact, and a single weight is not."""
    shape = (3, 8, 8)
    bands = Bands(shape, 4, "luma-chroma")
    spread = torch.tensor([3.0, 1.0, 0.4, 0.2, 1.0, 0.3, 0.1, 0.05], dtype=F64)

    def model(x, t):
        t = torch.as_tensor(t).reshape(-1)[0]
        return bands.apply(x, spread.square() / (spread.square() + t * t))

    ode = iia.ProbabilityFlowODE(model, iia.EDM())
    found = fit(ode, 2, noise=normal(32, *shape), budget=replace(REFINED, iterations=2, teacher_steps=30))
    tried = {i.name: i.error for i in found.record.search.ingredients}
    best = next(name for name in tried if name.startswith("bands") and "refined" not in name)
    assert tried[best] < 0.1 * tried["scalars"]
    assert any(name.startswith("bands") and "refined" in name for name in tried)
    again = iia.load(found.save(tmp_path / "fit.safetensors"))
    assert len(found.table().splitlines()) > found.nfe and str(again) == str(found)
    x = start_of(found, normal(8, *shape, seed=1))
    assert torch.equal(iia.sample(ode, x, solver=again), iia.sample(ode, x, solver=found))


def test_weights_that_are_maps_are_shown_for_each_group():
    ode = iia.ProbabilityFlowODE(lambda x, t: x / (1 + t.reshape(-1, 1, 1, 1) ** 2), iia.EDM())
    x = 80 * normal(24, 1, 8, 8, dtype=torch.float32)
    found = IIA("ddim", terms=Window(bands=2), guard=False).fit(ode, x, iia.grids.karras(3))
    table = replace(found, reports=()).table()
    final = found.plan.canonical().final.weights[1]
    assert [line for line in table.splitlines() if line in final.projections.names] == list(final.projections.names)
    assert all(f"{value:.4f}" in table for value in final.coefficients.tolist())
