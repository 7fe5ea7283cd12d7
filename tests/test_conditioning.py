"""Conditioning, guidance and the views of an ODE: what reaches the model, and how often it is called."""

import math
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import EPS, F64, Recorder, close, every_prediction, normal
from torch import nn
from torch.utils._pytree import tree_flatten

import iia_ode as iia
from iia_ode import ProbabilityFlowODE
from iia_ode.ode import Shared, cached

C, NULL = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64), torch.zeros(1, dtype=F64)


def guided(scale: float, model: nn.Module | None = None, **extra: object) -> ProbabilityFlowODE:
    """A guided ODE on four samples; `extra` goes to both branches."""
    return ProbabilityFlowODE(
        model or Recorder(),
        iia.EDM(),
        conditioning={"c": C, **extra},
        unconditional={"c": NULL, **extra},
        guidance_scale=scale,
    )


# ---- conditioning ----------------------------------------------------------------------------------------------------


def test_conditioning_reaches_the_model_one_entry_per_sample():
    model, x = Recorder(), normal(4, 3)
    out = ProbabilityFlowODE(model, iia.EDM(), conditioning={"c": C, "mode": "fast"}).data(x, 1.0)
    assert torch.equal(model.calls[0]["c"], C)
    assert model.calls[0]["mode"] == "fast"  # what is no tensor is handed on as it is
    assert torch.equal(out, 0.5 * x + C[:, None])


@pytest.mark.parametrize("shape", [(), (1,), (1, 3)], ids=str)
def test_one_condition_serves_every_sample(shape):
    model = Recorder()
    out = ProbabilityFlowODE(model, iia.EDM(), conditioning={"c": torch.full(shape, 7.0, dtype=F64)}).data(
        normal(4, 3), 1.0
    )
    assert model.calls[0]["c"].shape == (4, *shape[1:])
    assert torch.equal(out, 0.5 * normal(4, 3) + 7.0)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_conditions_for_another_number_of_samples_are_an_input_error(scale):
    with pytest.raises(iia.errors.InputError, match="'c' has 4 entries for a batch of 3"):
        guided(scale).data(normal(3, 3), 1.0)


def test_another_condition_is_a_view_that_shares_model_and_ledger():
    ode = guided(2.0)
    view = ode.condition(c=2 * C)
    x = normal(4, 3)
    close(view.data(x, 1.0), 0.5 * x + 4 * C[:, None], rtol=4 * EPS)
    close(ode.data(x, 1.0), 0.5 * x + 2 * C[:, None], rtol=4 * EPS)
    assert view.model is ode.model
    assert ode.nfe == view.nfe == 2


# ---- guidance --------------------------------------------------------------------------------------------------------


@given(st.floats(-2.0, 15.0))
def test_guidance_is_the_null_branch_plus_w_times_the_difference(w):
    x = normal(4, 3)
    conditioned, null = 0.5 * x + C[:, None], 0.5 * x
    close(guided(w).data(x, 1.0), null + w * (conditioned - null), atol=8 * EPS * (1 + 4 * abs(w)))


@every_prediction
def test_guidance_acts_on_what_the_model_predicts_and_so_on_every_form(prediction):
    w, t, x = 3.0, 0.7, normal(4, 3)
    options = {"conditioning": {"c": C}, "unconditional": {"c": NULL}}
    both = ProbabilityFlowODE(Recorder(), iia.VP(), prediction, guidance_scale=w, **options).evaluate(x, t)
    one = ProbabilityFlowODE(Recorder(), iia.VP(), prediction, conditioning={"c": C}).evaluate(x, t)
    other = ProbabilityFlowODE(Recorder(), iia.VP(), prediction, conditioning={"c": NULL}).evaluate(x, t)
    for form in ("data", "noise", "score", "v", "velocity"):
        expected = other.as_form(form) + w * (one.as_form(form) - other.as_form(form))
        close(both.as_form(form), expected, rtol=1e-12, atol=1e-12 * expected.abs().max().item())


def test_guidance_is_one_call_on_a_doubled_batch_and_scale_one_a_single_plain_call():
    ode, x = guided(2.0), normal(4, 3)
    ode.data(x, 1.0)
    (call,) = ode.model.calls
    assert torch.equal(call["x"], torch.cat([x, x]))
    assert call["c"].tolist() == [*C.tolist(), 0.0, 0.0, 0.0, 0.0]
    assert call["t"].tolist() == [1.0] * 8
    plain = guided(1.0)
    assert torch.equal(plain.data(x, 1.0), 0.5 * x + C[:, None])
    (call,) = plain.model.calls
    assert call["x"].shape == (4, 3)
    assert (ode.ledger.evaluations, ode.ledger.samples) == (1, 4)
    assert (plain.ledger.evaluations, plain.ledger.samples) == (1, 4)


def test_guidance_hands_on_what_is_no_tensor():
    ode, x = guided(2.0, mode="fast"), normal(4, 3)
    close(ode.data(x, 1.0), 0.5 * x + 2 * C[:, None], rtol=4 * EPS)
    assert ode.model.calls[0]["mode"] == "fast"


def test_a_half_precision_model_is_guided_in_the_precision_of_the_state():
    x = normal(4, 3, dtype=torch.float32)
    model = Recorder(torch.bfloat16)
    branches = [ProbabilityFlowODE(model, iia.EDM(), conditioning={"c": c}).data(x, 1.0) for c in (C, NULL.expand(4))]
    expected = branches[1] + 7.5 * (branches[0] - branches[1])
    close(guided(7.5, model).data(x, 1.0), expected, rtol=8 * torch.finfo(torch.float32).eps, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"conditioning": {"c": C}},
        {"unconditional": {"c": NULL}},
        {"conditioning": {"c": C}, "unconditional": {"label": NULL}},
        {},
    ],
    ids=["no null", "no condition", "other keywords", "neither"],
)
def test_guidance_without_a_matching_null_condition_is_an_input_error(options):
    with pytest.raises(iia.errors.InputError, match="unconditional="):
        ProbabilityFlowODE(Recorder(), iia.EDM(), guidance_scale=2.0, **options)


# ---- subsets ---------------------------------------------------------------------------------------------------------

PICKS = [slice(1, 3), torch.tensor([3, 0]), torch.tensor([False, True, True, False])]


@pytest.mark.parametrize("index", PICKS, ids=["slice", "indices", "mask"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_subset_takes_its_conditions_along(index, scale):
    ode, x = guided(scale), normal(4, 3)
    close(ode.subset(index, 4).data(x[index], 1.0), ode.data(x, 1.0)[index], rtol=4 * EPS)


@pytest.mark.parametrize("index", PICKS, ids=["slice", "indices", "mask"])
def test_a_subset_takes_the_null_conditions_along_where_every_sample_has_its_own(index):
    ode = ProbabilityFlowODE(Recorder(), iia.EDM(), conditioning={"c": C}, unconditional={"c": -C}, guidance_scale=2.0)
    x = normal(4, 3)
    close(ode.subset(index, 4).data(x[index], 1.0), ode.data(x, 1.0)[index], rtol=4 * EPS)


def test_a_subset_keeps_the_condition_that_serves_every_sample():
    one = torch.full((1,), 7.0, dtype=F64)
    ode = ProbabilityFlowODE(Recorder(), iia.EDM(), conditioning={"c": one, "mode": "fast"})
    view, x = ode.subset(slice(2, 4), 4), normal(2, 3)
    assert torch.equal(view.data(x, 1.0), 0.5 * x + 7.0)
    assert ode.model.calls[0]["mode"] == "fast"
    assert ode.nfe == 1


# ---- trees of conditions ---------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "first second")
GRID = iia.grids.karras(3)

NESTINGS = {
    "flat": lambda a, b: {"a": a, "b": b},
    "dict": lambda a, b: {"c": {"a": a, "b": b}},
    "dict in another order": lambda a, b: {"c": {"b": b, "a": a}},
    "deep": lambda a, b: {"c": {"a": {"x": [a]}, "b": (b, {})}},
    "list": lambda a, b: {"c": [a, b]},
    "tuple": lambda a, b: {"c": (a, b, None, "fast", 3, True)},
    "named tuple": lambda a, b: {"c": Pair(a, b)},
    "ordered dict": lambda a, b: {"c": OrderedDict(a=a, b=b)},
}


def tensors(tree: object) -> list[torch.Tensor]:
    """The tensors of a tree, in the order of their numbers of components."""
    return sorted((v for v in tree_flatten(tree)[0] if isinstance(v, torch.Tensor)), key=lambda v: v.ndim)


def of_tree(x, t, **kw):
    """A denoiser with a scalar condition [B] and a condition [B, 4], wherever they are."""
    a, b = tensors(kw)
    return x / (1 + t[:, None] ** 2) + (0.1 * a[:, None] + 0.01 * b).to(x).tanh()


def nested(name: str, guidance_scale: float = 1.0, n: int = 16) -> ProbabilityFlowODE:
    make = NESTINGS[name]
    return ProbabilityFlowODE(
        of_tree,
        iia.EDM(),
        conditioning=make(normal(n), normal(n, 4, seed=1)),
        unconditional=make(torch.zeros(1, dtype=F64), torch.zeros(1, 4, dtype=F64)),
        guidance_scale=guidance_scale,
    )


@cache
def results(name: str, scale: float, searched: bool) -> list[object]:
    """A run, a fit and, if asked for, a search and statistics."""
    ode, x = nested(name, scale), 80 * normal(16, 4, seed=2)
    found = [iia.sample(ode, x, GRID), (ode.nfe, ode.ledger.samples)]
    method = iia.IIA("ddim", target="trajectory", guard=False)
    found.append(method.fit(ode, x, GRID, chunk_size=5).plan)
    if searched:
        budget = iia.Budget(draws=0, teacher_steps=6, trials=2, starts=1, iterations=1, chunk_size=5)
        found.append(iia.fit(ode, 2, x=x, budget=budget).plan)
        found.append(iia.ModelStatistics.estimate(ode, x, iia.grids.karras(2), points=2).s)
    return found


@pytest.mark.parametrize("name", NESTINGS)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_fit_and_its_samples_do_not_depend_on_the_nesting_of_conditions(name, scale):
    searched = name == "deep" and scale == 3.0
    for found, expected in zip(results(name, scale, searched), results("flat", scale, searched), strict=True):
        if isinstance(expected, torch.Tensor):
            assert torch.equal(found, expected)
        elif isinstance(expected, iia.Plan):
            assert found.difference(expected) == 0
        else:
            assert found == expected == (5, 80)


@pytest.mark.parametrize("name", NESTINGS)
@given(
    st.permutations(range(6)),
    st.integers(1, 6),
    st.sampled_from([1.0, 2.0]),
    st.booleans(),
)
@settings(max_examples=6)
def test_a_subset_of_a_tree_commutes_with_an_evaluation(name, order, count, scale, memoized):
    ode, x, index = nested(name, scale, n=6), normal(6, 4, seed=3), torch.tensor(order[:count])
    ode = cached(ode) if memoized else ode
    whole = ode.output(x, 1.0)
    assert torch.equal(ode.subset(index, 6).output(x[index], 1.0), whole[index])
    assert torch.equal(ode.subset(slice(0, count), 6).output(x[:count], 1.0), whole[:count])


@pytest.mark.parametrize("name", NESTINGS)
def test_one_call_on_a_doubled_batch_equals_two_calls(name):
    ode, x = nested(name, 3.0, n=6), normal(6, 4)
    apart = ProbabilityFlowODE(of_tree, **ode.settings | {"batched_guidance": False})
    assert torch.equal(apart.output(x, 1.0), ode.output(x, 1.0))
    assert (ode.ledger.evaluations, ode.ledger.samples) == (1, 6)
    assert (apart.ledger.evaluations, apart.ledger.samples) == (2, 12)
    null, condition = (ode.branches(x, 1.0)[k] for k in (1, 0))
    assert torch.equal(torch.lerp(null, condition, 3.0), ode.output(x, 1.0))


def pooled(x, t, ctx=None, ids=None, **others):
    """A denoiser with a context of any length, or None, and position ids without batch axis."""
    y = x / (1 + t[:, None] ** 2)
    y = y if ctx is None else y + 0.1 * ctx.mean((1, 2))[:, None]
    return y if ids is None else y + 0.01 * ids.sum()


@pytest.mark.parametrize(
    "null",
    [
        {"ctx": torch.zeros(1, 154, 8)},
        {"ctx": None},
        {"ctx": torch.zeros(1, 7, 8, dtype=F64)},
    ],
    ids=["another length", "None", "another dtype"],
)
def test_branches_that_are_not_of_one_batch_are_two_calls(null):
    x, ctx = normal(2, 3), torch.ones(2, 7, 8)
    ode = ProbabilityFlowODE(pooled, iia.EDM(), conditioning={"ctx": ctx}, unconditional=null, guidance_scale=5.0)
    one, other = (ProbabilityFlowODE(pooled, iia.EDM(), conditioning=c).output(x, 1.0) for c in ({"ctx": ctx}, null))
    close(ode.output(x, 1.0), other + 5 * (one - other), rtol=1e-6)
    assert ode.nfe == 2
    fit = iia.preset("iia-ddim").fit(ode, 80 * x, GRID, chunk_size=1)
    assert torch.isfinite(iia.sample(ode, 80 * x, solver=fit)).all()


@pytest.mark.parametrize("length", [5, 2], ids=["another length than the batch", "the length of the batch"])
def test_a_shared_condition_goes_to_the_model_whole(length):
    ids, x = normal(length, 3), 80 * normal(2, 3)
    ctx = {"ctx": torch.ones(2, 7, 8)}
    shared = Shared(ids)
    both = {"conditioning": {**ctx, "ids": shared}, "unconditional": {"ctx": torch.zeros(1, 7, 8), "ids": shared}}
    for options in ({"conditioning": both["conditioning"]}, {**both, "guidance_scale": 2.0}):
        ode = ProbabilityFlowODE(pooled, iia.EDM(), **options)
        bare = ProbabilityFlowODE(
            lambda x, t, **kw: pooled(x, t, **kw) + 0.01 * ids.sum(),
            iia.EDM(),
            **{k: v if k == "guidance_scale" else {"ctx": v["ctx"]} for k, v in options.items()},
        )
        close(iia.sample(ode, x, GRID), iia.sample(bare, x, GRID), rtol=1e-12)
        assert ode.nfe == bare.nfe
        close(ode.subset(slice(1, 2), 2).output(x[1:], 1.0), bare.subset(slice(1, 2), 2).output(x[1:], 1.0), rtol=1e-12)
    other = ProbabilityFlowODE(
        pooled,
        iia.EDM(),
        **{**both, "unconditional": {**both["unconditional"], "ids": Shared(2 * ids)}},
        guidance_scale=2.0,
    )
    other.output(x, 1.0)
    assert other.nfe == 2  # the two branches have different ids
    with pytest.raises(iia.errors.InputError, match=r"'ids' has 7 entries for a batch of 2.*Shared"):
        ProbabilityFlowODE(pooled, iia.EDM(), conditioning={"ids": normal(7, 3)}).output(x, 1.0)


def test_a_list_of_prompts_has_a_string_per_sample():
    seen = []

    def model(x, t, prompt, encoders=("clip", "t5", "vae")):
        assert len(prompt) == len(x) and len(encoders) == 3
        seen.append(list(prompt))
        return x * torch.tensor([[float(len(p))] for p in prompt], dtype=x.dtype)

    prompts, x = ["a", "bb", "ccc", "dddd"], normal(4, 3)
    ode = ProbabilityFlowODE(model, iia.EDM(), conditioning={"prompt": prompts, "encoders": Shared(["x", "y", "z"])})
    close(ode.output(x, 1.0), x * torch.arange(1.0, 5.0)[:, None])
    close(
        ode.subset(torch.tensor([False, True, False, True]), 4).output(x[:2], 1.0), x[:2] * torch.tensor([[2.0], [4.0]])
    )
    ode = ProbabilityFlowODE(
        model, iia.EDM(), conditioning={"prompt": prompts}, unconditional={"prompt": ["-"] * 4}, guidance_scale=2.0
    )
    close(ode.output(x, 1.0), x * (2 * torch.arange(1.0, 5.0)[:, None] - 1), rtol=1e-12)
    assert ode.nfe == 1 and seen[-1] == [*prompts, "-", "-", "-", "-"]
    iia.preset("iia-ddim").fit(ode, 80 * x, GRID, chunk_size=2)
    single = ProbabilityFlowODE(
        model, iia.EDM(), conditioning={"prompt": prompts}, unconditional={"prompt": [""]}, guidance_scale=2.0
    )
    single.output(x, 1.0)
    assert single.nfe == 1 and seen[-1] == [*prompts, "", "", "", ""]


def test_a_list_of_numbers_is_split_with_the_samples_and_a_tuple_of_numbers_is_one_value():
    seen = []

    def model(x, t, y, size):
        seen.append((list(y), size))
        return x * torch.tensor(y, dtype=x.dtype)[:, None]

    x = normal(4, 3)
    ode = ProbabilityFlowODE(model, iia.EDM(), conditioning={"y": [1, 2, 3, 4.5], "size": (64, 32, 8, 4)})
    close(ode.output(x, 1.0), x * torch.tensor([[1.0], [2.0], [3.0], [4.5]]))
    ode.subset(slice(1, 3), 4).output(x[1:3], 1.0)
    assert seen[-1] == ([2, 3], (64, 32, 8, 4))
    ode.condition(y=[7], size=(1, 1)).output(x, 1.0)
    assert seen[-1] == ([7, 7, 7, 7], (1, 1))
    iia.preset("iia-ddim").fit(ode, 80 * x, GRID, chunk_size=2)
    for wrong in ([1, 2, 3], ["a", "b"], ("a", "b")):
        with pytest.raises(iia.errors.InputError, match=r"'y' is a .* entries for a batch of 4: .*Shared"):
            iia.sample(ode.condition(y=wrong, size=(1, 1)), 80 * x, GRID)


def test_a_condition_of_stride_zero_is_hashed_and_compared():
    x = 80 * normal(4, 3)
    c = torch.full([1], 3.5, dtype=F64).expand(2)[:1]
    twice = x[[0, 0, 1, 2, 3]]
    for value in (c, c.expand(5), torch.full((1, 1), 3.5, dtype=F64).expand(5, 1), torch.conj(torch.ones(1) * 1j)):
        ode = ProbabilityFlowODE(lambda x, t, c: x / 2, iia.EDM(), conditioning={"c": value})
        with pytest.warns(iia.errors.DuplicateWarning):
            iia.IIA("ddim", guard=False).fit(ode, twice, GRID, held_out=0.25)
        iia.Teacher.solve(ode, twice, 80.0, 0.0, steps=3).check(ode, twice)


def test_a_teacher_tells_conditions_apart_by_every_leaf():
    x = 80 * normal(6, 4)
    ode = nested("deep", n=6)
    teacher = iia.Teacher.solve(ode, x, 80.0, 0.0, steps=3)
    teacher.check(nested("deep", n=6), x)
    a, b = (torch.clone(v) for v in tensors(ode.conditioning))
    b[5, 3] += 1e-9
    with pytest.raises(iia.errors.MismatchError, match="other conditions"):
        teacher.check(ode.condition(**NESTINGS["deep"](a, b)), x)


def test_constants_per_class_know_a_class_in_a_tree():
    label = torch.arange(32) % 2

    def model(x, t, cond):
        return x / (1 + t[:, None] ** 2) + (2.0 * cond["y"][:, None] - 1) * t[:, None] ** 2 / (1 + t[:, None] ** 2)

    def flat(x, t, y):
        return model(x, t, {"y": y})

    x = 80 * normal(32, 3)
    budget = iia.Budget(draws=32, teacher_steps=6, trials=2, starts=0, warm_starts=True)
    found = [
        iia.fit(ProbabilityFlowODE(f, iia.EDM(), conditioning=c), 2, x=x, budget=budget)
        for f, c in ((model, {"cond": {"y": label}}), (flat, {"y": label}))
    ]
    errors = [[i.error for i in fit.record.search.ingredients] for fit in found]
    assert errors[0] == errors[1]
    assert any("per cond.y" in i.name for i in found[0].record.search.ingredients)


@dataclass
class Embedding:
    """Conditions in a class that nobody registered."""

    text: torch.Tensor


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros(4), r"'c' is a NumPy array: give a tensor"),
        ({"text": np.zeros(4)}, r"'c.text' is a NumPy array"),
        (Embedding(torch.zeros(4)), r"'c' is a Embedding with tensors"),
        (UserDict(text=torch.zeros(4)), r"'c' is a UserDict with tensors"),
        ({"text": [torch.zeros(4), torch.zeros(3)]}, r"'c.text.1' has 3 entries for a batch of 4"),
    ],
    ids=["NumPy", "NumPy in a dict", "dataclass", "mapping", "another length"],
)
def test_a_condition_that_cannot_be_split_is_an_input_error(value, message):
    with pytest.raises(iia.errors.InputError, match=message):
        iia.sample(ProbabilityFlowODE(lambda x, t, c: x, iia.EDM(), conditioning={"c": value}), 80 * normal(4, 3), GRID)
    ode = ProbabilityFlowODE(lambda x, t, c: x, iia.EDM())
    with pytest.raises(iia.errors.InputError, match=message):
        iia.sample(ode.condition(c=value), 80 * normal(4, 3), GRID)


def test_gradients_flow_to_conditions_in_a_tree():
    a, b = normal(2).requires_grad_(), normal(2, 4).requires_grad_()
    make = NESTINGS["deep"]
    ode = ProbabilityFlowODE(
        of_tree, iia.EDM(), conditioning=make(a, b), unconditional=make(0 * a, 0 * b), guidance_scale=2.0
    )
    iia.odeint(ode, 80 * normal(2, 4), GRID)[-1].sum().backward()
    assert a.grad.abs().min() > 0 and b.grad.abs().min() > 0


# ---- scales of guidance ----------------------------------------------------------------------------------------------


def with_scale(scale: object, n: int = 4) -> ProbabilityFlowODE:
    return nested("dict", scale, n)


@given(st.lists(st.floats(-2.0, 15.0), min_size=4, max_size=4), st.permutations(range(4)), st.integers(1, 4))
@settings(max_examples=10)
def test_a_scale_per_sample_is_the_scale_of_each_sample(scales, order, count):
    x, w = normal(4, 4, seed=3), torch.tensor(scales, dtype=F64)
    ode = with_scale(w)
    whole = ode.output(x, 1.0)
    for i in range(4):
        one = with_scale(scales[i]).subset(slice(i, i + 1), 4)
        close(whole[i : i + 1], one.output(x[i : i + 1], 1.0), rtol=1e-12, atol=1e-12)
    index = torch.tensor(order[:count])
    assert torch.equal(ode.subset(index, 4).output(x[index], 1.0), whole[index])
    known = cached(ode)
    with torch.no_grad():
        for part in (slice(0, 1), slice(1, 2)):
            same = known.subset(part, 4).output(x[:1], 1.0), ode.subset(part, 4).output(x[:1], 1.0)
            assert torch.equal(*same)


@pytest.mark.parametrize(
    ("scale", "same"),
    [
        (lambda t: 2.0, 2.0),
        (lambda t: torch.tensor(2.0), 2.0),
        (torch.tensor(2.0), 2.0),
        (np.float32(2.0), 2.0),
        (2, 2.0),
        (torch.full((4,), 2), 2.0),
        (torch.full((1,), 2.0), 2.0),
        (nn.Parameter(torch.tensor(2.0)), 2.0),
        (lambda t: 1.0, 1.0),
    ],
)
def test_scales_of_other_types_are_the_number_that_they_hold(scale, same):
    x, times = 80 * normal(4, 4, seed=3), torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64)
    ode, expected = with_scale(scale), with_scale(same)
    assert torch.equal(iia.sample(ode, x, GRID), iia.sample(expected, x, GRID))
    for t in (1.0, times[0], times):
        close(ode.output(x, t), expected.output(x, t), rtol=1e-12, atol=1e-12)
    fits = [iia.preset("iia-ddim").fit(o, x, GRID, chunk_size=3) for o in (ode, expected)]
    assert fits[0].plan.difference(fits[1].plan) < 1e-12
    assert torch.equal(ode.condition(**ode.conditioning).output(x, 1.0), ode.output(x, 1.0))


def interval(t):
    """Guidance between two levels only."""
    return 4.0 if 0.5 < t < 5 else 1.0


def smooth(t):
    """A smooth scale, in torch's operations or in numbers."""
    return 1 + 3 * t / (1 + t)


@pytest.mark.parametrize("scale", [interval, smooth])
def test_a_scale_of_time_is_the_scale_at_each_time(scale):
    x, times = normal(4, 4, seed=3), torch.tensor([0.1, 1.0, 3.0, 10.0], dtype=F64)
    ode = with_scale(scale)
    together = ode.output(x, times)
    for i, t in enumerate(times.tolist()):
        at = with_scale(float(scale(t)))
        close(ode.output(x, t), at.output(x, t), rtol=1e-12, atol=1e-12)
        close(ode.output(x, times[i]), at.output(x, t), rtol=1e-12, atol=1e-12)
        close(together[i], at.output(x, t)[i], rtol=1e-12, atol=1e-12)
    grid = iia.grids.karras(4, to_data=False)
    close(
        iia.odeint(ode, 80 * x, grid, method="torchdiffeq:euler"),
        iia.odeint(ode, 80 * x, grid, method="euler"),
        rtol=1e-9,
    )


def test_guidance_in_an_interval_costs_nothing_outside():
    calls = []
    ode = ProbabilityFlowODE(
        lambda x, t, c: calls.append(len(x)) or x,
        iia.EDM(),
        conditioning={"c": C},
        unconditional={"c": NULL},
        guidance_scale=interval,
    )
    for t in (0.1, 1.0, 10.0):
        ode.output(normal(4, 3), t)
    assert calls == [4, 8, 4]


def test_a_scale_of_time_has_a_derivative_by_the_time():
    t = torch.tensor(0.7, dtype=F64, requires_grad=True)
    ode, x = with_scale(smooth), normal(4, 4)
    (slope,) = torch.autograd.grad(ode.output(x, t).sum(), t)
    close(slope, (ode.output(x, 0.7 + 1e-6).sum() - ode.output(x, 0.7 - 1e-6).sum()) / 2e-6, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "scale",
    [
        "5", True, None, [2.0, 3.0], np.array("5"), math.inf, torch.tensor([1.0, math.nan]), torch.ones(2, 2),
        torch.ones(2) * 1j, float, torch.ones(0),
    ],
    ids=str,
)  # fmt: skip
def test_a_scale_that_is_none_is_an_input_error(scale):
    with pytest.raises(iia.errors.InputError, match="guidance scale must be a finite number"):
        with_scale(scale)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.ones(3), "has 3 entries for a batch of 4"),
        (lambda t: "2", "must return one finite number, got '2'"),
        (lambda t: math.nan, "one finite number, got nan"),
        (lambda t: torch.ones(4), r"one finite number, got a tensor \[4\]"),
        (lambda t: 1 / 0, "failed at t = 80.*ZeroDivisionError"),
        (lambda: 2.0, "failed at t = 80.*TypeError"),
    ],
)
def test_a_scale_that_fails_in_use_is_an_input_error(scale, message):
    with pytest.raises(iia.errors.InputError, match=message):
        iia.sample(with_scale(scale), 80 * normal(4, 4), GRID)


def test_the_record_of_a_fit_tells_the_scales(tmp_path):
    x = 80 * normal(4, 4)
    for scale, text in ((torch.tensor([2.0, 3.0, 2.5, 4.0]), "2 to 4 per sample"), (smooth, "per time")):
        fit = iia.preset("iia-ddim").fit(with_scale(scale), x, GRID)
        found = iia.load(fit.save(tmp_path / "fit.safetensors"))
        assert found.record == fit.record and text in str(found)
        iia.sample(with_scale(scale), x, solver=found)
        for other in (7.5, torch.full((4,), 9.0), interval):
            with pytest.warns(iia.errors.MismatchWarning, match="guidance_scale"):
                iia.sample(with_scale(other), x, solver=found)
    fit = iia.preset("iia-ddim").fit(with_scale(torch.tensor([2.0, 3.0, 2.5, 4.0])), x, GRID)
    iia.sample(with_scale(3.0), x, solver=fit)  # within the range of the fit
    teacher = iia.Teacher.solve(with_scale(torch.tensor([2.0, 3.0, 2.5, 4.0])), x, 80.0, 0.0, steps=3)
    for other in (torch.tensor([2.0, 3.0, 2.5, 4.1]), 3.0, smooth):
        with pytest.raises(iia.errors.MismatchError):
            teacher.check(with_scale(other), x)


def test_a_scale_is_kept_by_settings_and_may_be_set_later():
    for scale in (torch.tensor([2.0, 3.0, 2.5, 4.0]), smooth):
        ode = with_scale(scale)
        assert ode.settings["guidance_scale"] is scale
        assert torch.equal(
            ProbabilityFlowODE(of_tree, **ode.settings).output(normal(4, 4), 1.0), ode.output(normal(4, 4), 1.0)
        )
    ode.guidance_scale = 3
    assert torch.equal(ode.output(normal(4, 4), 1.0), with_scale(3.0).output(normal(4, 4), 1.0))


def test_a_step_of_cfg_plus_plus_is_a_ddim_step_at_a_scale_of_time():
    edm, x, w = iia.EDM(), 80 * normal(4, 4), 0.6
    grid = iia.grids.karras(6).tolist()

    def scale(t):
        s = grid[grid.index(t) + 1]
        return w * edm.alpha(s) / (edm.alpha(s) - edm.sigma(s) * edm.alpha(t) / edm.sigma(t))

    raw, state = with_scale(2.0), x
    for t, s in pairwise(grid):
        condition, null = raw.branches(state, t)
        noise = (state - edm.alpha(t) * null) / edm.sigma(t)
        state = edm.alpha(s) * torch.lerp(null, condition, w) + edm.sigma(s) * noise
    close(iia.sample(with_scale(scale), x, torch.tensor(grid, dtype=F64), "ddim"), state, rtol=1e-9, atol=1e-9)


# ---- views and the model's own state ---------------------------------------------------------------------------------


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, t, c=None):
        return self.dropout(x)


@pytest.mark.parametrize("training", [False, True])
def test_making_an_ode_or_a_view_leaves_the_model_in_the_mode_it_was_in(training):
    model = Dropping().train(training)
    ode = ProbabilityFlowODE(model, iia.EDM(), conditioning={"c": C})
    for view in (ode, ode.condition(c=2 * C), ode.subset(slice(0, 2), 4)):
        assert model.training is training
        assert model.dropout.training is training
        if not training:
            n = 2 if view.conditioning["c"].numel() == 2 else 4
            assert torch.equal(view.data(normal(n, 3), 1.0), normal(n, 3))


def test_an_ode_is_a_module_that_moves_and_counts_with_its_model():
    ode = ProbabilityFlowODE(Recorder(torch.float32), iia.EDM())
    assert [name for name, _ in ode.named_parameters()] == ["model.scale"]
    ode.to(F64)
    ode.data(normal(2, 3), 1.0)
    assert ode.model.calls[0]["x"].dtype == F64
