"""Linear maps as weights: decompositions, arithmetic, plans that run with them, and constants per condition."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import F64, Recorder, close, gaussian, normal
from torch import Tensor

import iia_ode as iia
from iia_ode.plan import (
    Bands,
    Combine,
    Evaluate,
    LinearMap,
    PerCondition,
    Plan,
    Principal,
    Projections,
    Tracer,
    Vector,
    projections_from,
    trace,
)
from iia_ode.plan.storing import restore, store
from iia_ode.plan.vectors import weight_mean, weight_mean_square, weight_size


def orthogonal(n: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(n, n, seed=seed))[0]


KINDS: dict[str, Projections] = {
    "bands of an image": Bands((3, 6, 5), 3, "luma-chroma"),
    "bands of one channel": Bands((1, 8, 8), 4, "luma-chroma"),
    "bands and channel directions": Bands((2, 4, 4), 2, orthogonal(2)),
    "channels only": Bands((3, 4, 4), 1, "luma-chroma"),
    "bands of a sequence": Bands((2, 12), 3),
    "every frequency": Bands((9,), "all"),
    "principal": Principal(orthogonal(12)[:4], (3, 2, 2)),
    "principal, none": Principal(torch.zeros(0, 5), (5,)),
    "principal, all": Principal(orthogonal(5), (5,)),
}
every_kind = pytest.mark.parametrize("p", KINDS.values(), ids=KINDS)


def unit(p: Projections, g: int) -> LinearMap:
    return LinearMap(p, torch.eye(p.count, dtype=F64)[g])


# ---- decompositions --------------------------------------------------------------------------------------------------


@every_kind
def test_projections_are_an_orthogonal_decomposition_of_the_identity(p: Projections) -> None:
    x, y = normal(7, *p.shape, seed=1), normal(7, *p.shape, seed=2)
    images = [unit(p, g)(x) for g in range(p.count)]
    close(torch.stack(images).sum(0), x, atol=1e-12)
    for g, image in enumerate(images):
        close(unit(p, g)(image), image, atol=1e-12)
        for h in range(p.count):
            if h != g:
                close(unit(p, h)(image), torch.zeros_like(x), atol=1e-12)
    close(p.inner(x, y), torch.stack([(a * y).sum() for a in images]), atol=1e-11)
    assert float(p.sizes.sum()) == math.prod(p.shape)
    assert len(p.names) == len(set(p.names)) == p.count


@every_kind
def test_projections_come_back_from_their_configuration_and_tensors(p: Projections) -> None:
    other = projections_from(json.loads(json.dumps(p.config())), {k: v.clone() for k, v in p.tensors().items()})
    assert other == p and hash(other) == hash(p)
    assert other != Bands((4, 4), 2) and p != "bands"
    coefficients = normal(p.count)
    assert torch.equal(other.apply(normal(2, *p.shape), coefficients), p.apply(normal(2, *p.shape), coefficients))


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_a_map_keeps_the_dtype_and_leaves_its_argument_alone(p: Projections, dtype: torch.dtype) -> None:
    x, m = normal(4, *p.shape, dtype=dtype), LinearMap(p, normal(p.count, seed=3))
    kept = x.clone()
    y = m(x)
    assert y.dtype == dtype and y.shape == x.shape and torch.equal(x, kept)
    close(y.double(), m(x.double()), atol=1e-5 if dtype == torch.float32 else 0.0)
    assert all(a is b for a, b in zip(m.ready(x), m.ready(x), strict=True))  # copied once


def test_frequencies_are_those_of_the_cosine_transform_and_the_mean_is_in_the_lowest_band() -> None:
    p = Bands((1, 16, 16), 4)
    flat = torch.ones(1, 1, 16, 16, dtype=F64)
    close(unit(p, 0)(flat), flat, atol=1e-14)
    i = torch.arange(16, dtype=F64) + 0.5
    fine = torch.cos(math.pi / 16 * 15 * i).expand(1, 1, 16, 16)
    close(unit(p, 3)(fine), fine, atol=1e-13)
    assert p.sizes.tolist() == sorted(p.sizes.tolist())
    assert Bands((3, 8, 8), 2, "luma-chroma").names == (
        "band 1, luma",
        "band 2, luma",
        "band 1, chroma",
        "band 2, chroma",
    )


def test_luma_is_what_is_equal_in_all_channels() -> None:
    p, x = Bands((3, 4, 4), 1, "luma-chroma"), normal(2, 3, 4, 4)
    close(unit(p, 0)(x), x.mean(1, keepdim=True).expand_as(x), atol=1e-14)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Bands((2, 2, 4, 4), 2),
        lambda: Bands((4,), 4),
        lambda: Bands((8, 8), 0),
        lambda: Bands((3, 8, 8), 2, torch.ones(3, 3)),
        lambda: Principal(torch.ones(2, 4), (4,)),
        lambda: Principal(torch.eye(4), (5,)),
        lambda: KINDS["principal, all"].apply(normal(2, 4), torch.ones(6)),
        lambda: projections_from({"kind": "principal", "shape": [4]}, {}),
    ],
)
def test_what_is_no_decomposition_is_refused(make: Any) -> None:
    with pytest.raises(iia.errors.InputError):
        make()


def test_unknown_kinds_of_channels_and_projections_are_named() -> None:
    with pytest.raises(iia.errors.UnknownNameError, match="luma-chroma"):
        Bands((3, 8, 8), 2, "luma")
    with pytest.raises(iia.errors.UnknownNameError, match="principal"):
        projections_from({"kind": "pincipal", "shape": [4]}, {})


# ---- arithmetic ------------------------------------------------------------------------------------------------------

P = Bands((2, 6), 3)
COEFFICIENTS = st.lists(st.floats(-4, 4), min_size=3, max_size=3).map(lambda v: torch.tensor(v, dtype=F64))
MAPS = COEFFICIENTS.map(lambda c: LinearMap(P, c))


@given(MAPS, MAPS, st.floats(-4, 4))
def test_arithmetic_on_maps_is_arithmetic_on_operators(a: LinearMap, b: LinearMap, k: float) -> None:
    x = normal(3, 2, 6)
    close((a + b)(x), a(x) + b(x), atol=1e-12)
    close((a - b)(x), a(x) - b(x), atol=1e-12)
    close((a * b)(x), a(b(x)), atol=1e-12)
    close((a + k)(x), a(x) + k * x, atol=1e-12)
    close((k - a)(x), k * x - a(x), atol=1e-12)
    close((k * a)(x), k * a(x), atol=1e-12)
    close((-a)(x), -a(x), atol=1e-12)
    close((a / 4)(x), a(x) / 4, atol=1e-12)
    assert a == LinearMap(Bands((2, 6), 3), a.coefficients.clone()) and hash(a + 0.0 * b) == hash(a + 0.0 * b)


REFUSED = """m + other; m * other; m / m; m / 0; 1 / m; m * tensor; tensor * m; m + tensor; m * "x"; v / m; v * m * tensor;
    v * tensor * m; v * m + v * tensor; v * m + v * other"""


@pytest.mark.parametrize("expression", [e.strip() for e in REFUSED.split(";")])
def test_what_has_no_common_decomposition_is_refused_with_a_reason(expression: str) -> None:
    names = {"m": LinearMap(P, torch.ones(3)), "other": LinearMap(Bands((2, 6), 2), torch.ones(2))}
    with pytest.raises(iia.errors.PlanError, match=r"linear map|real numbers"):
        eval(expression, {**names, "tensor": torch.ones(2, 6), "v": Vector({0: 1.0})})


@given(MAPS, MAPS, st.floats(-3, 3))
def test_vectors_take_maps_as_weights_and_map_their_constants(a: LinearMap, b: LinearMap, k: float) -> None:
    x, c = normal(1, 2, 6), normal(2, 6, seed=4)
    v = a * (Vector({0: k}) + c) + Vector({0: 2.0}) * b
    total = v.weights.get(0, 0.0)
    image = total(x) if isinstance(total, LinearMap) else total * x
    close(image + v.constant, a(k * x + c) + 2 * b(x), atol=1e-11)
    assert (Vector({0: 1.0}) * LinearMap(P, torch.ones(3))).index is None


def test_the_size_and_the_means_of_a_map_are_those_of_its_operator() -> None:
    m = LinearMap(Bands((1, 8, 8), 2), torch.tensor([3.0, -0.5]))
    matrix = m(torch.eye(64, dtype=F64).reshape(64, 1, 8, 8)).reshape(64, 64)
    assert weight_size(m) == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)))
    assert weight_mean(m) == pytest.approx(float(matrix.trace()) / 64)
    assert weight_mean_square(m) == pytest.approx(float(matrix.square().sum()) / 64)
    assert (weight_mean(0.5), weight_mean_square(torch.tensor([1.0, 2.0])), weight_size(-2.0)) == (0.5, 2.5, 2.0)


@pytest.mark.parametrize("coefficients", [torch.ones(2), torch.tensor([1.0, math.nan, 0.0]), torch.ones(3, 1)])
def test_a_map_needs_a_finite_number_for_each_group(coefficients: Tensor) -> None:
    with pytest.raises(iia.errors.PlanError, match="3 finite coefficients"):
        LinearMap(P, coefficients)


# ---- plans -----------------------------------------------------------------------------------------------------------


class Banded(iia.Solver):
    """Euler, with its slope split in two and put together again, plus what `extra` adds."""

    order = 1

    def __init__(self, p: Projections, extra: float = 0.0) -> None:
        self._p, self._extra = p, extra

    def step(self, ode: Any, x: Any, t: float, s: float, past: Any) -> Any:
        c = torch.linspace(-1.0, 2.0, self._p.count, dtype=F64)
        d = ode.velocity(x, t)
        low = LinearMap(self._p, c + self._extra) * d
        return x + (s - t) * (low + LinearMap(self._p, 1 - c) * d)


def _problem(shape: tuple[int, ...]) -> Any:
    return iia.problems.Gaussian(normal(*shape), normal(*shape, seed=1).square() + 0.1)


@every_kind
def test_a_plan_with_maps_runs_as_its_formula_says(p: Projections) -> None:
    grid = torch.tensor([5.0, 2.0, 1.0], dtype=F64)
    problem, schedule = _problem(p.shape), iia.EDM()
    plan = trace(Banded(p), schedule, grid)  # consistent on every group
    euler = iia.get_solver("euler").plan(schedule, grid)
    x = problem.noisy(4, schedule, 5.0)
    close(plan.run(problem.ode(schedule), x), euler.run(problem.ode(schedule), x), atol=1e-11)
    assert plan.run(problem.ode(schedule), x.float()).dtype == torch.float32
    with pytest.raises(iia.errors.PlanError, match="not a consistent solver"):
        trace(Banded(p, 0.1), schedule, grid)


def test_a_plan_says_which_of_its_weights_are_maps_and_what_cannot_be_known_of_it() -> None:
    m = LinearMap(P, torch.tensor([1.0, 0.5, 0.2]))
    code = (Evaluate(0, 2.0, "data"), Combine(((0, m), (1, 1.0 - m)), step=1))
    plan = Plan(iia.EDM(), (2.0, 1.0), code)
    assert "v2 = map Bands[3] v0 + map Bands[3] v1" in str(plan)
    assert plan.difference(plan) == 0.0
    shifted = replace(plan, code=(code[0], Combine(((0, m + 1e-3), (1, 1.0 - m)), step=1)))
    assert plan.difference(shifted) == pytest.approx(1e-3, rel=1.0)
    with pytest.raises(iia.errors.PlanError, match="matrix of numbers"):
        plan.canonical().matrix()
    with pytest.raises(iia.errors.PlanError, match="mix components"):
        plan.on_gaussian(torch.zeros(2, 6), 1.0)
    same = replace(plan, code=(code[0], Combine(((0, 0.5 + 0 * m), (1, 0.5)), step=1)))
    close(same.on_gaussian(torch.zeros(2, 6), 1.0).gain[0, 0], 0.5 + 0.5 / 5, atol=1e-12)
    with pytest.raises(iia.errors.InputError, match=r"linear map of samples \[2, 6\]"):
        plan.run(gaussian().ode(iia.EDM()), normal(2, 3))


def test_a_map_runs_under_inference_and_autocast_and_then_with_gradients() -> None:
    p = Bands((1, 8, 8), 2)
    m = LinearMap(p, torch.tensor([1.0, 0.3]))
    plan = Plan(iia.EDM(), (2.0, 1.0), (Combine(((0, m),), normal(1, 8, 8), step=1),))
    x = normal(2, 1, 8, 8, dtype=torch.float32)
    ode = iia.ProbabilityFlowODE(Recorder(torch.float32), iia.EDM())
    with torch.inference_mode():
        first = plan.run(ode, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(plan.run(ode, x), first)
    x.requires_grad_()
    plan.run(ode, x).sum().backward()
    assert x.grad is not None


def test_the_tensors_of_a_plan_are_copied_to_a_place_once() -> None:
    weight, constant = normal(3), normal(3, seed=1)
    ins = Combine(((0, weight), (1, 2.0)), constant, step=1)
    like = torch.zeros(2, 3, dtype=torch.float32)
    (terms, c), (again, d) = ins.on(like), ins.on(like)
    assert terms[0][1] is again[0][1] and c is d and c.dtype == terms[0][1].dtype == torch.float32
    assert ins.on(like.double())[1] is constant


def test_gradients_reach_the_coefficients_at_every_run() -> None:
    c = torch.ones(3, dtype=F64, requires_grad=True)
    for _ in range(2):
        plan = Plan(iia.EDM(), (2.0, 1.0), (Combine(((0, LinearMap(P, c)),), step=1),))
        plan.run(iia.ProbabilityFlowODE(Recorder(), iia.EDM()), normal(2, 2, 6)).square().sum().backward()
    x = normal(2, 2, 6)
    close(c.grad, 4 * P.inner(x, x), atol=1e-10)


def test_a_held_vector_with_a_map_is_not_taken_for_another() -> None:
    tracer, x = Tracer(iia.EDM()), Vector({0: 1.0})
    first, second = tracer.hold(unit(P, 0) * x), tracer.hold(unit(P, 1) * x)
    assert first.index != second.index


# ---- constants per condition -----------------------------------------------------------------------------------------


def conditional(table: Tensor | None = None, labels: Any = None, key: str = "c") -> Tensor:
    table = normal(3, 4) if table is None else table
    code = (Evaluate(0, 2.0, "data"), Combine(((1, 1.0),), PerCondition("c", (7, 2, 5), table), step=1))
    plan = Plan(iia.EDM(), (2.0, 1.0), code)
    conditions = {} if labels is None else {key: labels}
    ode = iia.ProbabilityFlowODE(lambda x, t, **_: 0 * x, iia.EDM(), conditioning=conditions)
    return plan.run(ode, normal(3, 4))


def test_each_sample_gets_the_constant_of_its_condition() -> None:
    table = normal(3, 4)
    close(conditional(table, torch.tensor([5, 7, 5])), table[[2, 0, 2]])
    for one in (2, torch.tensor(2), torch.tensor([2])):
        close(conditional(table, one), table[[1, 1, 1]])
    close(conditional(normal(3), torch.tensor([5, 7, 2])), normal(3)[[2, 0, 1], None].expand(3, 4))


@pytest.mark.parametrize(
    ("labels", "key", "message"),
    [
        (None, "c", r"each value of the integer condition 'c'.*\[\]"),
        (torch.tensor([5, 7, 5]), "label", r"\['label'\]"),
        (torch.tensor([5.0, 7.0, 5.0]), "c", "another kind"),
        (torch.tensor([5, 3, 4]), "c", "c = 7, 2, 5, none for 3, 4"),
        ("cat", "c", "another kind"),
    ],
)
def test_a_condition_that_the_plan_does_not_know_is_a_mismatch(labels: Any, key: str, message: str) -> None:
    with pytest.raises(iia.errors.MismatchError, match=message):
        conditional(labels=labels, key=key)


def test_constants_per_condition_are_scaled_mapped_and_added() -> None:
    per = PerCondition("c", (0, 1), normal(2, 2, 6))
    m = LinearMap(P, normal(3, seed=2))
    v = (m * (Vector({0: 1.0}) + per) - 2 * per + normal(2, 6)) / 2
    close(v.constant.table, (m(per.table) - 2 * per.table + normal(2, 6)) / 2, atol=1e-13)
    small = PerCondition("c", (0, 1), normal(2))
    close((small + normal(2, 6)).table, normal(2)[:, None, None] + normal(2, 6))
    with pytest.raises(iia.errors.PlanError, match="other values"):
        per + PerCondition("c", (0, 2), normal(2, 2, 6))
    for values, table in (((0, 0), normal(2)), ((0.5,), normal(1)), ((0, 1), normal(3)), ((), normal(0))):
        with pytest.raises(iia.errors.PlanError):
            PerCondition("c", values, table)


def test_a_plan_with_constants_per_condition_says_so_and_has_no_single_response() -> None:
    plan = Plan(iia.EDM(), (2.0, 1.0), (Combine(((0, 1.0),), PerCondition("c", (0, 1), normal(2, 3)), step=1),))
    assert "constant[3] per c" in str(plan)
    assert plan.equivalent(plan)
    with pytest.raises(iia.errors.PlanError, match="per condition"):
        plan.on_gaussian(torch.zeros(3), 1.0)


# ---- files -----------------------------------------------------------------------------------------------------------


@every_kind
def test_a_map_is_stored_as_json_and_tensors_that_equal_projections_share(p: Projections) -> None:
    maps = {f"weight.{k}": LinearMap(p, normal(p.count, seed=k)) for k in (1, 2)}
    parts = {key: store(m, key) for key, m in maps.items()}
    tensors = {name: v for _, found in parts.values() for name, v in found.items()}
    assert len(tensors) == 2 + len(p.tensors())
    known: dict[str, Projections] = {}
    for key, m in maps.items():
        about = json.loads(json.dumps(parts[key][0]))
        assert restore(about, key, tensors, known) == m
        assert restore(about, key, tensors, {}) == m
    assert list(known) == [p.digest]
    with pytest.raises(iia.errors.InputError, match=r"not what they were|configuration"):
        restore({**parts["weight.1"][0], "digest": "0"}, "weight.1", tensors, {})  # type: ignore[dict-item]


def test_a_tensor_and_a_constant_per_condition_are_stored_too() -> None:
    per, plain = PerCondition("c", (3, 1), normal(2, 4)), normal(4)
    about, tensors = store(per, "constant.3")
    back = restore(json.loads(json.dumps(about)), "constant.3", tensors, {})
    assert isinstance(back, PerCondition) and (back.key, back.values) == ("c", (3, 1))
    assert torch.equal(back.table, per.table)
    about, tensors = store(plain, "weight.1.0")
    assert about is None and torch.equal(restore(None, "weight.1.0", tensors, {}), plain)
    with pytest.raises(iia.errors.InputError, match=r"weight\.2\.0 is incomplete"):
        restore(None, "weight.2.0", tensors, {})
