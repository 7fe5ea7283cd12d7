"""The least squares behind every fit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import iia_ode as iia
from iia_ode.iia import LeastSquares

F64 = torch.float64


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


@given(st.integers(0, 10_000))
def test_the_solution_is_the_least_squares_solution(seed):
    a, b = problem(seed)
    solution = fed(a, b).solve()
    expected = torch.linalg.lstsq(a, b[:, None], driver="gelsd").solution[:, 0]
    assert torch.allclose(solution.coefficients, expected, rtol=1e-11, atol=0)
    assert solution.rank == 3
    assert solution.before == pytest.approx(float(b.square().mean().sqrt()), rel=1e-12)
    assert solution.after == pytest.approx(float((b - a @ expected).square().mean().sqrt()), rel=1e-12)


@given(st.integers(0, 10_000), st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_chunks_of_any_size_give_the_very_same_numbers(seed, sizes):
    a, b = problem(seed, rows=sum(sizes) + 5)
    whole, parts = fed(a, b).solve(), fed(a, b, [*sizes, 5]).solve()
    assert torch.equal(whole.coefficients, parts.coefficients)
    assert (whole.before, whole.after) == (parts.before, parts.after)


@given(st.integers(0, 10_000))
def test_two_halves_merge_into_the_whole(seed):
    a, b = problem(seed)
    first, second = fed(a[:20], b[:20]), fed(a[20:], b[20:])
    first.merge(second)
    assert torch.equal(first.solve().coefficients, fed(a, b).solve().coefficients)
    assert first.rows == 60


@given(st.integers(0, 10_000), st.integers(1, 9))
def test_the_components_of_a_sample_are_so_many_rows(seed, per_sample):
    a, b = problem(seed, rows=10 * per_sample)
    system = LeastSquares(3)
    system.add([column.reshape(10, per_sample) for column in a.T], b.reshape(10, per_sample))
    assert system.rows == 10 * per_sample
    assert torch.allclose(system.solve().coefficients, fed(a, b).solve().coefficients, rtol=1e-10, atol=0)


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


def test_rows_that_are_not_finite_are_refused():
    a, b = problem(5)
    b[7] = torch.nan
    with pytest.raises(iia.NonFiniteError, match="NaN or infinity"):
        fed(a, b).solve()


def test_misuse_is_named():
    with pytest.raises(iia.InputError, match="no samples"):
        LeastSquares(2).solve()
    with pytest.raises(iia.InputError, match="at least one column"):
        LeastSquares(0)
    with pytest.raises(iia.InputError, match="expected 2 columns, got 3"):
        LeastSquares(2).add([c[:, None] for c in problem(0)[0].T], problem(0)[1][:, None])
    with pytest.raises(iia.InputError, match="cannot merge 3 columns into 2"):
        LeastSquares(2).merge(LeastSquares(3))
