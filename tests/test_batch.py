"""The batch: samples with their conditions, trajectories and final states, in parts and without copies."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import F64, mixture, normal

import iia_ode as iia
from iia_ode import Teacher
from iia_ode.errors import DuplicateWarning, InputError
from iia_ode.iia import Batch
from iia_ode.iia.batch import held_out_of, per_sample

EDM = iia.EDM()


def labelled(x, t, label, scale=1.0):
    return (label.to(x)[:, None] * scale + x) / (1 + t[:, None] ** 2)


@pytest.fixture(scope="module")
def batch():
    """Ten samples, each under a condition of its own, with a teacher and a condition for all of them."""
    ode = iia.ProbabilityFlowODE(labelled, EDM, conditioning={"label": torch.arange(10), "scale": torch.ones(1, 1)})
    x = 80.0 * normal(10, 3)
    return Batch(ode, x, Teacher.solve(ode, x, 80.0, 0.0, steps=12), chunk_size=4)


PLAN = iia.get_solver("heun").plan(EDM, iia.grids.karras(3))


@pytest.mark.parametrize(
    "index", [slice(2, 7), torch.tensor([8, 0, 3]), torch.arange(10) % 2 == 0], ids=["slice", "tensor", "mask"]
)
def test_a_part_of_a_batch_has_its_own_conditions_and_trajectories(batch, index):
    part, whole = batch[index], PLAN.run(batch.ode, batch.x)
    assert len(part) == len(part.x) == len(batch.x[index]) and part.chunk_size == 4
    assert torch.equal(part.ode.conditioning["label"], batch.ode.conditioning["label"][index])
    assert part.ode.conditioning["scale"].shape == (1, 1)
    assert torch.equal(PLAN.run(part.ode, part.x), whole[index])
    assert torch.equal(part.target, batch.target[index]) and torch.equal(
        part.taught.at(1.0), batch.taught.at(1.0)[index]
    )
    part.taught.check(part.ode, part.x)


@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 29))
def test_chunks_and_a_split_hold_every_sample_once_in_order(samples, size, held):
    ode = iia.ProbabilityFlowODE(labelled, EDM, conditioning={"label": torch.arange(samples)})
    batch = Batch(ode, normal(samples, 2), chunk_size=size)
    parts = list(batch.chunks())
    assert all(len(p) <= size for p in parts) and len(parts) == -(-samples // size)
    for found in (parts, batch.split(min(held, samples - 1))):
        assert torch.equal(torch.cat([p.x for p in found]), batch.x)
        assert torch.equal(torch.cat([p.ode.conditioning["label"] for p in found]), torch.arange(samples))
    assert len(batch.split(min(held, samples - 1))[1]) == min(held, samples - 1)


def test_errors_are_those_of_each_sample_whatever_the_chunks(batch):
    final = PLAN.run(batch.ode, batch.x)
    expected = (final - batch.taught.final).square().mean(dim=1).sqrt()
    for size in (None, 1, 4, 99):
        errors = Batch(batch.ode, batch.x, batch.teacher, size).errors(PLAN)
        assert errors.dtype == F64 and errors.device.type == "cpu" and not errors.requires_grad
        assert torch.allclose(errors, expected, rtol=1e-10)
    known = Batch(batch.ode, batch.x, final=final)
    assert float(known.errors(PLAN).max()) == 0 and torch.equal(known.target, final)


def test_a_sample_that_is_lost_has_an_error_that_is_not_finite_and_harms_no_other():
    def breaks(x, t):
        return torch.where(x[:, :1] > 0, x * torch.nan, x / (1 + t[:, None] ** 2))

    ode, x = iia.ProbabilityFlowODE(breaks, EDM), normal(8, 3)
    x[:, 0] = torch.tensor([1.0, -1.0] * 4)
    errors = Batch(ode, x, final=x).errors(PLAN)
    assert torch.equal(errors.isfinite(), x[:, 0] < 0)


def test_errors_of_images_are_root_mean_squares_over_all_components():
    difference = normal(4, 3, 5, 5)
    assert torch.allclose(per_sample(difference), difference.reshape(4, -1).square().mean(dim=1).sqrt())


def test_a_batch_without_a_teacher_says_how_to_make_one():
    plain = Batch(mixture().ode(EDM), normal(4, 4))
    for ask in (lambda: plain.taught, lambda: plain.target, lambda: plain.errors(PLAN)):
        with pytest.raises(InputError, match=r"no teacher: make one with Teacher.solve"):
            ask()
    for bad in (0, -1, 2.0, True):
        with pytest.raises(InputError, match="chunk_size"):
            Batch(mixture().ode(EDM), normal(4, 4), chunk_size=bad)


def test_a_state_under_the_same_condition_is_a_copy_and_under_another_is_not():
    x = normal(4, 3)[torch.arange(8) % 4]
    for label, expected in (
        (torch.arange(8) % 4, [True] * 4 + [False] * 4),
        (torch.arange(8), [True] * 8),
        (torch.tensor([0, 0, 0, 0, 0, 1, 0, 1]), [True] * 4 + [False, True, False, True]),
    ):
        ode = iia.ProbabilityFlowODE(labelled, EDM, conditioning={"label": label})
        assert Batch(ode, x).distinct().tolist() == expected


def test_copies_are_left_out_with_a_warning_that_counts_them(batch):
    assert batch.without_copies() is batch
    doubled = batch[torch.arange(20) % 10]
    with pytest.warns(DuplicateWarning, match="10 of 20 draws of noise repeat others under the same conditions"):
        own = doubled.without_copies()
    assert torch.equal(own.x, batch.x) and torch.equal(own.target, batch.target)
    assert torch.equal(own.ode.conditioning["label"], torch.arange(10))


def test_states_that_differ_in_the_last_bit_are_no_copies():
    x = normal(1, 3).repeat(2, 1)
    x[1, 2] = torch.nextafter(x[1, 2], torch.tensor(torch.inf, dtype=F64))
    assert Batch(mixture().ode(EDM), x).distinct().all()


@given(st.integers(2, 300), st.floats(0.01, 0.99))
def test_a_share_holds_out_one_draw_at_least_and_never_all(draws, share):
    held = held_out_of(draws, share)
    assert 1 <= held <= draws - 1 and abs(held - share * draws) <= 1
    for bad in (0.0, 1.0, -0.5):
        with pytest.raises(InputError, match="held_out"):
            held_out_of(draws, bad)
