"""What is remembered in a search is what the model would have said, and is said for nothing else."""

import pytest
import torch
from support import generator, mixture

import iia_ode as iia
from iia_ode.iia import remembered, search
from iia_ode.iia.remembered import Memory, RememberedODE

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
    memory.put(b"large", torch.zeros(31, dtype=torch.float64))
    assert memory.get(b"large") is None
    assert torch.equal(memory.get(b"d"), one)


@pytest.mark.parametrize("budget", ["closed-form", "standard"])
def test_a_fit_is_the_same_with_and_without_and_costs_a_quarter_less_to_search_for(budget, monkeypatch):
    x = mixture().noisy(48, EDM, 80.0, generator(3))
    found = []
    for wrap in (RememberedODE, lambda ode: ode):
        monkeypatch.setattr(search, "RememberedODE", wrap)
        found.append(iia.fit(mixture().ode(EDM), 6, x, budget=budget, report=None))
    with_it, without = found
    assert with_it.plan.grid == without.plan.grid
    assert torch.equal(with_it.plan.run(mixture().ode(EDM), x), without.plan.run(mixture().ode(EDM), x))
    costs = [
        next(i["sample_evaluations"] for i in f.about["recipe"]["ingredients"] if i["name"] == "scalars") for f in found
    ]
    assert costs[0] < 0.8 * costs[1]


def test_a_memory_that_holds_nothing_changes_nothing(monkeypatch):
    x = mixture().noisy(16, EDM, 80.0, generator(3))
    found = [iia.fit(mixture().ode(EDM), 4, x, budget="closed-form", report=None)]
    monkeypatch.setattr(remembered.Memory, "put", lambda *_: None)
    found.append(iia.fit(mixture().ode(EDM), 4, x, budget="closed-form", report=None))
    first, second = (f.plan.run(mixture().ode(EDM), x) for f in found)
    assert torch.equal(first, second)
