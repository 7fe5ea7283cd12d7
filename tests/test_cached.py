"""Memoized evaluations: equal to the model's own to the last bit, and found for nothing else."""

import copy

import pytest
import torch
from support import generator, mixture, normal

import iia_ode as iia
from iia_ode.autofit import fit
from iia_ode.denoisers import dynamic_thresholding
from iia_ode.errors import InputError
from iia_ode.ode import Wrapped, cached
from iia_ode.ode.cached import Cached, Memory

EDM = iia.EDM()


def labelled(x, t, label, scale=1.0):
    return x / (1 + t[:, None] ** 2) + scale * label


def ode_and_states(n: int = 4):
    label = torch.randn((n, 1), generator=generator(1), dtype=torch.float64)
    ode = iia.ProbabilityFlowODE(labelled, EDM, conditioning={"label": label})
    return ode, torch.randn((n, 3), generator=generator(2), dtype=torch.float64)


@torch.no_grad()
def test_a_repeated_evaluation_is_equal_to_the_last_bit_and_costs_nothing():
    ode, x = ode_and_states()
    known = cached(ode)
    plan = iia.get_solver("heun").plan(EDM, iia.grids.karras(4, sigma_max=1.0))
    first, evaluations = plan.run(known, x), ode.nfe
    assert evaluations == plan.nfe
    assert torch.equal(plan.run(known, x), first)
    assert ode.nfe == evaluations
    assert torch.equal(first, plan.run(ode, x))


@torch.no_grad()
@pytest.mark.parametrize(
    "other",
    [
        lambda ode, x: (ode, x + 1e-15, 2.0),
        lambda ode, x: (ode, x, 2.0 + 1e-15),
        lambda ode, x: (ode, x, torch.tensor([2.0, 2.0, 2.0, 3.0], dtype=torch.float64)),
        lambda ode, x: (ode, x.float(), 2.0),
        lambda ode, x: (ode, x.flip(0), 2.0),
        lambda ode, x: (ode.subset(torch.tensor([1, 0, 2, 3]), 4), x, 2.0),
        lambda ode, x: (ode.subset(slice(0, 2), 4), x[:2], 2.0),
        lambda ode, x: (ode.condition(label=torch.zeros(4, 1, dtype=torch.float64)), x, 2.0),
        lambda ode, x: (ode.condition(label=ode.conditioning["label"], scale=2.0), x, 2.0),
        lambda ode, x: (ode, x.repeat(1, 2)[:, ::2], 2.0),
    ],
)
def test_other_states_times_or_conditions_are_evaluated_anew(other):
    ode, x = ode_and_states()
    known = cached(ode)
    known.output(x, 2.0)
    asked, before = ode.nfe, other(known, x)
    again, states, t = before
    plain, _, _ = other(ode, x)
    assert torch.equal(again.output(states, t), plain.output(states, t))
    assert ode.nfe == asked + 2


@torch.no_grad()
def test_conditions_that_are_no_tensors_are_told_apart_also_in_copies():
    ode = iia.ProbabilityFlowODE(lambda x, t, by: x * by[0], EDM, conditioning={"by": [1.0]})
    known, x = cached(ode), torch.ones(2, 3, dtype=torch.float64)
    others = [[float(k)] for k in range(2, 200)]
    for view in (known, copy.deepcopy(known)):
        assert torch.equal(view.output(x, 2.0), x)
        for other in others:
            assert torch.equal(view.condition(by=other).output(x, 2.0), x * other[0])
    assert torch.equal(known.condition(by=[7.0]).output(x, 2.0), 7 * x)  # an object that nobody else keeps
    assert torch.equal(known.condition(by=[8.0]).output(x, 2.0), 8 * x)


@torch.no_grad()
def test_numbers_that_lie_alike_in_memory_are_told_apart_by_their_shape_and_dtype():
    known = cached(iia.ProbabilityFlowODE(lambda x, t: 2 * x, EDM))
    x = torch.zeros(2, 6)
    for same in (x, x.reshape(2, 2, 3), x.reshape(2, 3, 2), torch.zeros(2, 3, dtype=torch.float64)):
        assert known.output(same, 2.0).shape == same.shape
        assert known.output(same, 2.0).dtype == same.dtype


@torch.no_grad()
def test_guided_evaluations_are_memoized_under_both_of_their_conditions():
    label = torch.ones(4, 1, dtype=torch.float64)
    x = torch.randn((4, 3), generator=generator(2), dtype=torch.float64)
    for thresholded in (lambda ode: ode, dynamic_thresholding):
        ode = thresholded(
            iia.ProbabilityFlowODE(
                labelled, EDM, conditioning={"label": label}, unconditional={"label": 0 * label}, guidance_scale=2.0
            )
        )
        known = cached(ode)
        assert known.fingerprint() == ode.fingerprint()
        for view, plain in (
            (known, ode),
            (known.subset(slice(0, 2), 4), ode.subset(slice(0, 2), 4)),
            (known.condition(label=3 * label), ode.condition(label=3 * label)),
        ):
            states = x[: len(view.conditioning["label"])]
            for _ in range(2):
                assert torch.equal(view.output(states, 2.0), plain.output(states, 2.0))


@torch.no_grad()
def test_the_ledger_counts_what_the_model_evaluates():
    ode, x = ode_and_states()
    known = cached(ode)
    with known.counting() as spent:
        for _ in range(3):
            known.output(x, 2.0)
            known.subset(slice(0, 2), 4).output(x[:2], 2.0)
    assert (spent.evaluations, spent.samples) == (2, 6)
    assert known.nfe == ode.nfe == 2


@torch.no_grad()
def test_views_keep_the_class_of_the_ode_and_the_cache():
    class Clamped(iia.ProbabilityFlowODE):
        def output(self, x, t):
            return super().output(x, t).clamp(-1, 1)

        def subset(self, index, batch):
            return Clamped(self.model, **super().subset(index, batch).settings)

    class Halved(Wrapped):
        def output(self, x, t):
            return 0.5 * self.inner.output(x, t)

    x = torch.full((4, 2), 5.0)
    for ode, expected in (
        (cached(Clamped(lambda x, t: 3 * x, EDM)), 1.0),
        (cached(Halved(iia.ProbabilityFlowODE(lambda x, t: 3 * x, EDM))), 7.5),
        (Halved(cached(iia.ProbabilityFlowODE(lambda x, t: 3 * x, EDM))), 7.5),
    ):
        with ode.counting() as spent:
            for view in (ode.subset(slice(0, 2), 4), ode.subset(slice(2, 4), 4).condition()):
                assert type(view) is type(ode) and torch.equal(view.output(x[:2], 2.0), torch.full((2, 2), expected))
        assert spent.evaluations == 1


def test_an_ode_is_memoized_once_and_only_where_its_output_is_heard():
    class Scaled(iia.ProbabilityFlowODE):
        def evaluate(self, x, t, form="data"):
            return super().evaluate(0.9 * x, t, form)

    ode, _ = ode_and_states()
    known = cached(ode)
    assert cached(known) is known and cached(known.subset(slice(0, 2), 4)).inner.ledger is ode.ledger
    with pytest.raises(InputError, match="Scaled overrides evaluate"):
        cached(Scaled(labelled, EDM))


@torch.no_grad()
def test_a_caller_may_change_an_output_without_changing_the_cache():
    ode, x = ode_and_states()
    known = cached(ode)
    right = ode.output(x, 2.0)
    for _ in range(3):
        answer = known.output(x, 2.0)
        assert torch.equal(answer, right)
        answer.zero_()


def test_gradients_are_those_of_the_model():
    ode, x = ode_and_states()
    known = cached(ode)
    with torch.no_grad():
        known.output(x, 2.0)
    state = x.clone().requires_grad_()
    known.output(state, 2.0).sum().backward()
    assert torch.allclose(state.grad, torch.full_like(x, 1 / 5))


@torch.no_grad()
def test_the_cache_stays_within_its_limit_and_drops_the_least_recently_used_output():
    ode, x = ode_and_states()
    known = Cached(ode)
    known.memory = Memory(limit=3 * x.numel() * x.element_size())

    def cost(*times):
        before = ode.nfe
        for t in times:
            assert torch.equal(known.output(x, t), labelled(x, torch.full((4,), t, dtype=x.dtype), **ode.conditioning))
        return ode.nfe - before

    assert cost(1.0, 2.0, 3.0) == 3 and cost(1.0) == 0
    assert cost(4.0) == 1  # drops the output at 2
    assert cost(1.0, 3.0, 4.0) == 0 and cost(2.0) == 1
    large = x.repeat(4, 1)
    view = known.condition(label=ode.conditioning["label"].repeat(4, 1))
    for _ in range(2):  # an output beyond the limit is not kept, and drops nothing
        assert view.output(large, 2.0).shape == large.shape
    assert cost(2.0, 4.0) == 0
    assert len(known.memory.outputs) == 3


SEARCH = iia.Budget(teacher_steps=20, trials=2, starts=1, iterations=1)


def test_a_fit_is_the_same_with_and_without_a_cache_and_costs_a_quarter_less_to_search_for():
    x = 80.0 * normal(32, 4)
    off = Cached(mixture().ode(EDM))
    off.memory = Memory(limit=0)
    with_it, without = (fit(ode, 2, x=x, budget=SEARCH) for ode in (mixture().ode(EDM), off))
    assert with_it.plan.difference(without.plan) == 0
    tried = [f.record.search.ingredients for f in (with_it, without)]
    assert [(i.name, i.error) for i in tried[0]] == [(i.name, i.error) for i in tried[1]]
    costs = [next(i.sample_evaluations for i in own if i.name == "scalars") for own in tried]
    assert costs[0] < 0.75 * costs[1]
