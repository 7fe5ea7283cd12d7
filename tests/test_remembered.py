"""What is remembered in a search is what the model would have said, and is said for nothing else."""

import copy

import pytest
import torch
from iia_ode.iia.remembered import Memory, RememberedODE
from support import generator, mixture

import iia_ode as iia
from iia_ode.denoisers import dynamic_thresholding
from iia_ode.iia import remembered

EDM = iia.EDM()


def labelled(x, t, label, scale=1.0):
    return x / (1 + t[:, None] ** 2) + scale * label


def ode_and_states(n: int = 4):
    label = torch.randn((n, 1), generator=generator(1), dtype=torch.float64)
    ode = iia.ProbabilityFlowODE(labelled, EDM, conditioning={"label": label})
    return ode, torch.randn((n, 3), generator=generator(2), dtype=torch.float64)


@torch.no_grad()
def test_what_is_asked_again_is_the_same_to_the_last_bit_and_no_evaluation():
    ode, x = ode_and_states()
    known = RememberedODE(ode)
    plan = iia.get_solver("heun").plan(EDM, iia.grids.karras(4))
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
def test_nothing_is_answered_that_was_asked_of_other_states_times_or_conditions(other):
    ode, x = ode_and_states()
    known = RememberedODE(ode)
    known.output(x, 2.0)
    asked, before = ode.nfe, other(known, x)
    again, states, t = before
    plain, _, _ = other(ode, x)
    assert torch.equal(again.output(states, t), plain.output(states, t))
    assert ode.nfe == asked + 2


@torch.no_grad()
def test_conditions_that_are_no_tensors_are_told_apart_also_in_copies():
    ode = iia.ProbabilityFlowODE(lambda x, t, by: x * by[0], EDM, conditioning={"by": [1.0]})
    known, x = RememberedODE(ode), torch.ones(2, 3, dtype=torch.float64)
    others = [[float(k)] for k in range(2, 200)]
    for view in (known, copy.deepcopy(known)):
        assert torch.equal(view.output(x, 2.0), x)
        for other in others:
            assert torch.equal(view.condition(by=other).output(x, 2.0), x * other[0])
    assert torch.equal(known.condition(by=[7.0]).output(x, 2.0), 7 * x)  # an object that nobody else keeps
    assert torch.equal(known.condition(by=[8.0]).output(x, 2.0), 8 * x)


@torch.no_grad()
def test_numbers_that_lie_alike_in_memory_are_told_apart_by_their_shape_and_dtype():
    known = RememberedODE(iia.ProbabilityFlowODE(lambda x, t: 2 * x, EDM))
    x = torch.zeros(2, 6)
    for same in (x, x.reshape(2, 2, 3), x.reshape(2, 3, 2), torch.zeros(2, 3, dtype=torch.float64)):
        assert known.output(same, 2.0).shape == same.shape
        assert known.output(same, 2.0).dtype == same.dtype


@torch.no_grad()
def test_guided_evaluations_are_remembered_under_both_of_their_conditions():
    label = torch.ones(4, 1, dtype=torch.float64)
    x = torch.randn((4, 3), generator=generator(2), dtype=torch.float64)
    for thresholded in (lambda ode: ode, dynamic_thresholding):
        ode = thresholded(
            iia.ProbabilityFlowODE(
                labelled, EDM, conditioning={"label": label}, unconditional={"label": 0 * label}, guidance_scale=2.0
            )
        )
        known = RememberedODE(ode)
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
def test_the_ledger_counts_what_the_model_made_whoever_asks():
    ode, x = ode_and_states()
    known = RememberedODE(ode)
    with known.counting() as spent:
        for _ in range(3):
            known.output(x, 2.0)
            known.subset(slice(0, 2), 4).output(x[:2], 2.0)
    assert (spent.evaluations, spent.samples) == (2, 6)
    assert known.nfe == ode.nfe == 2


@torch.no_grad()
def test_an_ode_whose_views_are_its_own_keeps_them():
    class Clamped(iia.ProbabilityFlowODE):
        def output(self, x, t):
            return super().output(x, t).clamp(-1, 1)

        def subset(self, index, batch):
            view = super().subset(index, batch)
            return Clamped(view.model, **view.settings)

    known = RememberedODE(Clamped(lambda x, t: 3 * x, EDM))
    x = torch.full((4, 2), 5.0)
    assert torch.equal(known.subset(slice(0, 2), 4).output(x[:2], 2.0), torch.ones(2, 2))


@torch.no_grad()
def test_what_a_caller_does_to_an_answer_is_no_one_elses():
    ode, x = ode_and_states()
    known = RememberedODE(ode)
    right = ode.output(x, 2.0)
    for _ in range(3):
        answer = known.output(x, 2.0)
        assert torch.equal(answer, right)
        answer.zero_()


def test_gradients_are_those_of_the_model():
    ode, x = ode_and_states()
    known = RememberedODE(ode)
    with torch.no_grad():
        known.output(x, 2.0)
    state = x.clone().requires_grad_()
    known.output(state, 2.0).sum().backward()
    assert torch.allclose(state.grad, torch.full_like(x, 1 / 5))


def test_no_more_is_remembered_than_the_limit_and_what_was_asked_for_longest_ago_goes_first():
    memory, one = Memory(limit=3 * 80), torch.arange(10, dtype=torch.float64)
    for k in b"abc":
        memory.put(bytes([k]), one + k)
    assert torch.equal(memory.get(b"a"), one + ord("a"))
    memory.put(b"d", one)
    assert memory.size == 3 * 80
    assert memory.get(b"b") is None
    assert torch.equal(memory.get(b"a"), one + ord("a"))
    memory.put(b"d", one + 1)
    assert memory.size == 3 * 80
    assert torch.equal(memory.get(b"d"), one + 1)
    memory.put(b"large", torch.zeros(31, dtype=torch.float64))
    assert memory.get(b"large") is None
    assert torch.equal(memory.get(b"d"), one + 1)


@pytest.mark.parametrize("budget", ["closed-form", "standard"])
def test_a_fit_is_the_same_with_and_without_and_costs_a_quarter_less_to_search_for(budget, monkeypatch):
    x = mixture().noisy(48, EDM, 80.0, generator(3))
    found = [iia.fit(mixture().ode(EDM), 6, x, budget=budget, report=None)]
    monkeypatch.setattr(remembered.Memory, "put", lambda *_: None)
    found.append(iia.fit(mixture().ode(EDM), 6, x, budget=budget, report=None))
    with_it, without = found
    assert with_it.plan.grid == without.plan.grid
    assert torch.equal(with_it.plan.run(mixture().ode(EDM), x), without.plan.run(mixture().ode(EDM), x))
    costs = [next(i.sample_evaluations for i in f.record.search.ingredients if i.name == "scalars") for f in found]
    assert costs[0] < 0.75 * costs[1]
