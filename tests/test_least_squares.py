"""The least squares behind every fit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import iia_ode as iia
from iia_ode.iia import LeastSquares

F64 = torch.float64
few = settings(max_examples=15)


def problem(seed, rows=60, columns=3):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(rows, columns, generator=g, dtype=F64) * torch.tensor([1e-3, 1.0, 1e3], dtype=F64)[:columns]
    return a, torch.randn(rows, generator=g, dtype=F64)


def fed(a, b, sizes=None):
    system = LeastSquares(a.shape[1])
    start = 0
    for size in sizes or [len(b)]:
        rows = slice(start, start + size)
        system.add([column[rows, None] for column in a.T], b[rows, None])
        start += size
    return system


@few
@given(st.integers(0, 10_000))
def test_the_solution_is_the_least_squares_solution(seed):
    a, b = problem(seed)
    solution = fed(a, b).solve()
    expected = torch.linalg.lstsq(a, b[:, None], driver="gelsd").solution[:, 0]
    assert torch.allclose(solution.coefficients, expected, rtol=1e-11, atol=0)
    assert solution.rank == 3
    assert solution.before == pytest.approx(float(b.square().mean().sqrt()), rel=1e-12)
    assert solution.after == pytest.approx(float((b - a @ expected).square().mean().sqrt()), rel=1e-12)


@few
@given(st.integers(0, 10_000), st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_chunks_of_any_size_give_the_very_same_numbers(seed, sizes):
    a, b = problem(seed, rows=sum(sizes) + 5)
    whole, parts = fed(a, b).solve(), fed(a, b, [*sizes, 5]).solve()
    assert torch.equal(whole.coefficients, parts.coefficients)
    assert (whole.before, whole.after) == (parts.before, parts.after)


@few
@given(st.integers(0, 10_000), st.integers(1, 9))
def test_the_components_of_a_sample_are_so_many_rows(seed, per_sample):
    a, b = problem(seed, rows=10 * per_sample)
    system = LeastSquares(3)
    system.add([column.reshape(10, per_sample) for column in a.T], b.reshape(10, per_sample))
    assert system.rows == 10 * per_sample
    assert torch.allclose(system.solve().coefficients, fed(a, b).solve().coefficients, rtol=1e-10, atol=0)


@few
@given(st.integers(0, 10_000), st.floats(1e-6, 1e6))
def test_ridge_is_relative_to_the_size_of_each_column(seed, scale):
    a, b = problem(seed)
    plain, scaled = fed(a, b).solve(ridge=0.3), fed(a * scale, b).solve(ridge=0.3)
    assert torch.allclose(plain.coefficients, scaled.coefficients * scale, rtol=1e-9, atol=0)


def test_more_ridge_means_a_smaller_correction_and_in_the_limit_none():
    a, b = problem(1)
    sizes = [float((fed(a, b).solve(ridge=r).coefficients * a.norm(dim=0)).norm()) for r in (0.0, 0.1, 1.0, 10.0, 1e20)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 1e-15 * sizes[0] * 1e3


def test_equal_columns_share_the_correction_instead_of_fighting():
    a, b = problem(2, columns=2)
    twice = torch.stack([a[:, 1], a[:, 1]], dim=1)
    solution = fed(twice, b).solve()
    alone = fed(a[:, 1:], b).solve()
    assert solution.rank == 1
    assert torch.allclose(solution.coefficients, alone.coefficients.expand(2) / 2, rtol=1e-10, atol=0)


def test_columns_of_zeros_get_no_weight():
    a, b = problem(3, columns=2)
    solution = fed(torch.stack([a[:, 1], torch.zeros(60, dtype=F64)], dim=1), b).solve()
    assert solution.coefficients[1] == 0
    assert solution.rank == 1
    nothing = fed(torch.zeros(60, 2, dtype=F64), b).solve()
    assert nothing.coefficients.tolist() == [0, 0]
    assert (nothing.rank, nothing.after) == (0, nothing.before)


def test_a_direction_that_is_only_rounding_is_not_fitted():
    a, b = problem(4, columns=2)
    noise = 1e-6 * torch.randn(60, generator=torch.Generator().manual_seed(0), dtype=F64)
    close = torch.stack([a[:, 1], a[:, 1] + noise], dim=1)
    rounding = torch.full((2,), float(noise.norm()), dtype=F64)
    wild, tame = fed(close, b).solve(), fed(close, b).solve(noise=rounding)
    assert (wild.rank, tame.rank) == (2, 1)
    assert float(wild.coefficients.abs().max()) > 1e3 * float(tame.coefficients.abs().max())
    assert tame.after <= tame.before


@given(st.integers(0, 10**6), st.sampled_from([1e-3, 1.0, 1e3]))
@few
def test_a_column_of_rounding_alone_is_no_burden_to_the_other_columns(seed, size):
    a, b = problem(seed, columns=2)
    rounding = 1e-14 * size * torch.randn(60, 1, generator=torch.Generator().manual_seed(seed), dtype=F64)
    noise = torch.tensor([0.0, 0.0, 1e-14 * size * 60**0.5], dtype=F64)
    plain, more = fed(a, b).solve(), fed(torch.cat([a, rounding], dim=1), b).solve(noise=noise)
    assert more.rank == 2 and more.coefficients[2] == 0
    torch.testing.assert_close(more.coefficients[:2], plain.coefficients, rtol=1e-9, atol=0)


def test_rows_that_are_not_finite_are_refused():
    a, b = problem(5)
    b[7] = torch.nan
    with pytest.raises(iia.errors.NonFiniteError, match="NaN or infinity"):
        fed(a, b).solve()


def test_misuse_is_named():
    with pytest.raises(iia.errors.InputError, match="no samples"):
        LeastSquares(2).solve()
    with pytest.raises(iia.errors.InputError, match="at least one column"):
        LeastSquares(0)
    with pytest.raises(iia.errors.InputError, match="expected 2 columns, got 3"):
        LeastSquares(2).add([c[:, None] for c in problem(0)[0].T], problem(0)[1][:, None])


# ---- an intercept ----------------------------------------------------------------------------------------------------


def batch(seed, samples=12, components=5, columns=3, offset=100.0):
    """Columns [B, D] whose means are large against their deviations, and a target."""
    g = torch.Generator().manual_seed(seed)
    means = offset * torch.randn(columns + 1, 1, components, generator=g, dtype=F64)
    values = means + torch.randn(columns + 1, samples, components, generator=g, dtype=F64)
    return list(values[:-1]), values[-1]


def with_intercept(columns, target, sizes=None):
    system = LeastSquares(len(columns), intercept=True)
    start = 0
    for size in sizes or [len(target)]:
        rows = slice(start, start + size)
        system.add([c[rows] for c in columns], target[rows])
        start += size
    return system


def dense(columns, target):
    """The same problem with one indicator column for each component, solved at once."""
    n, d = target.shape
    a = torch.cat([torch.stack([c.reshape(-1) for c in columns], dim=1), torch.eye(d, dtype=F64).repeat(n, 1)], dim=1)
    return torch.linalg.lstsq(a, target.reshape(-1, 1), driver="gelsd").solution[:, 0], a


@few
@given(st.integers(0, 10_000), st.integers(3, 12), st.integers(2, 6))
def test_an_intercept_is_fitted_jointly_with_the_other_columns(seed, samples, components):
    columns, target = batch(seed, samples, components)
    solution = with_intercept(columns, target).solve()
    expected, a = dense(columns, target)
    scale = float(expected.abs().max())
    assert torch.allclose(solution.coefficients, expected[:3], rtol=1e-7, atol=1e-9 * scale)
    assert torch.allclose(solution.constant, expected[3:], rtol=1e-7, atol=1e-8 * scale)
    assert solution.constant.shape == (components,)
    assert solution.before == pytest.approx(float(target.square().mean().sqrt()), rel=1e-12)
    assert solution.after == pytest.approx(
        float((target.reshape(-1) - a @ expected).square().mean().sqrt()), rel=1e-6, abs=1e-10
    )


@few
@given(st.integers(0, 10_000), st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_with_an_intercept_too_chunks_of_any_size_give_the_very_same_numbers(seed, sizes):
    columns, target = batch(seed, samples=sum(sizes) + 2)
    whole, parts = (with_intercept(columns, target, s).solve() for s in (None, [*sizes, 2]))
    assert torch.equal(whole.coefficients, parts.coefficients)
    assert torch.equal(whole.constant, parts.constant)


@few
@given(st.integers(0, 10_000), st.floats(1e-4, 10.0))
def test_ridge_shrinks_an_intercept_towards_zero_as_it_does_a_column(seed, ridge):
    columns, target = batch(seed, offset=1.0)
    n, d = target.shape
    solution = with_intercept(columns, target).solve(ridge=ridge)
    a = dense(columns, target)[1]
    # Columns count by what the allowed intercept leaves of them.
    mean = torch.stack([c.mean(0) for c in columns])
    left = torch.stack(
        [
            ((c - m).square().sum() + n * ridge / (1 + ridge) * m.square().sum())
            for c, m in zip(columns, mean, strict=True)
        ]
    )
    penalty = torch.diag(torch.cat([ridge * left, torch.full((d,), ridge * n, dtype=F64)]))
    expected = torch.linalg.solve(a.T @ a + penalty, a.T @ target.reshape(-1))
    assert torch.allclose(solution.coefficients, expected[:3], rtol=1e-7, atol=1e-9)
    assert torch.allclose(solution.constant, expected[3:], rtol=1e-7, atol=1e-9)
    nothing = with_intercept(columns, target).solve(ridge=1e300)
    assert float(nothing.constant.abs().max()) < 1e-200


def test_the_loss_on_other_samples_is_that_of_the_formula():
    columns, target = batch(3)
    other, wanted = batch(4)
    solution = with_intercept(columns, target).solve()
    predicted = sum(c * a for c, a in zip(solution.coefficients, other, strict=True)) + solution.constant
    loss = with_intercept(other, wanted, [5, 7]).residual(solution.coefficients, solution.constant)
    assert loss == pytest.approx(float((wanted - predicted).square().mean().sqrt()), rel=1e-10)


def test_one_sample_with_an_intercept_is_met_by_the_intercept_alone():
    columns, target = batch(0, samples=1)
    solution = with_intercept(columns, target).solve()
    assert (solution.rank, solution.coefficients.tolist()) == (0, [0, 0, 0])
    assert torch.equal(solution.constant, target[0])
