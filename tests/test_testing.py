"""The conformance suite and the certificate: right solvers pass, wrong solvers fail, and the measured numbers are right."""

import ast
import contextlib
import io
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import iia_ode as iia
from iia_ode import testing
from iia_ode.plan import Past
from iia_ode.solvers.transfer import ExponentialStep, lagrange_weights
from iia_ode.testing import conformance
from iia_ode.testing.cases import TRACKS
from iia_ode.testing.orders import OrderMeasurement, measure_order


def problem_of(solver: iia.Solver, check: str) -> str:
    """What one check finds wrong; empty if nothing."""
    (result,) = testing.run_checks(solver, [getattr(conformance, f"check_{check}")])
    return result.problem or ""


class AdamsBashforth(iia.Solver):
    """The classic in t with exact weights, started with what outputs there are."""

    steps = 4

    @property
    def order(self) -> int:  # type: ignore[override]
        return self.steps

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        history = ((t, ode.velocity(x, t)), *past.memory)[: self.steps]
        weights = lagrange_weights([u for u, _ in history], t, s)
        return x + sum(w * slope for w, (_, slope) in zip(weights, history, strict=True)), history


class AB1(AdamsBashforth):
    steps = 1


class AB2(AdamsBashforth):
    steps = 2


class AB3(AdamsBashforth):
    steps = 3


class PredictorCorrector(iia.Solver):
    """Third order predicted, fourth corrected; the grid has the prediction, and the corrected state is carried in memory."""

    order = 4

    def weights(self, ode: Any, times: list[float], t: float, s: float) -> tuple[float, list[float]]:
        """Exponential, on the data in log-SNR."""
        interval, start = ExponentialStep.of(ode.schedule, "data", t, s), ode.schedule.lam(t)
        h = ode.schedule.lam(s) - start
        return interval.keep, interval.weights([(ode.schedule.lam(u) - start) / h for u in times])

    def output(self, ode: Any, x: Any, t: float) -> Any:
        return ode.data(x, t)

    def carry(self, ode: Any, x: Any, t: float) -> Any:
        return ode.hold(x)

    def carried(self, ode: Any, y: Any, t: float) -> Any:
        return y

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        if ode.is_data(s):
            return ode.data(x, t)
        outputs, corrected = [(t, self.output(ode, x, t))], x
        if past.memory:
            before, y, history = past.memory
            outputs += history
            keep, w = self.weights(ode, [u for u, _ in outputs[:4]], before, t)
            corrected = keep * self.carried(ode, y, before) + sum(a * m for a, (_, m) in zip(w, outputs, strict=False))
        kept = self.carry(ode, corrected, t)
        keep, w = self.weights(ode, [u for u, _ in outputs[:3]], t, s)
        new = keep * self.carried(ode, kept, t) + sum(a * m for a, (_, m) in zip(w, outputs, strict=False))
        return new, (t, kept, tuple(outputs[:3]))


class CarriesScaled(PredictorCorrector):
    """The same, which carries x / alpha."""

    def carry(self, ode: Any, x: Any, t: float) -> Any:
        return ode.hold(x / ode.schedule.alpha(t))

    def carried(self, ode: Any, y: Any, t: float) -> Any:
        return ode.schedule.alpha(t) * y


class InTime(PredictorCorrector):
    """The same in t, on the velocity."""

    def weights(self, ode: Any, times: list[float], t: float, s: float) -> tuple[float, list[float]]:
        return 1.0, lagrange_weights(times, t, s)

    def output(self, ode: Any, x: Any, t: float) -> Any:
        return ode.velocity(x, t)


class NotHeld(PredictorCorrector):
    """The same, which carries the corrected state as a growing sum."""

    def carry(self, ode: Any, x: Any, t: float) -> Any:
        return x


# ---- right solvers ---------------------------------------------------------------------------------------------------


def test_a_correct_solver_of_ones_own_passes_without_being_registered() -> None:
    assert testing.check(AB2()) is None


def test_a_registered_solver_is_checked_by_its_name() -> None:
    (result,) = testing.run_checks("ddim", [conformance.check_plan_equals_eager_run])
    assert result.problem is None


@pytest.mark.parametrize(
    "solver",
    [AdamsBashforth(), PredictorCorrector(), CarriesScaled(), InTime()],
    ids=lambda s: s.name,
)
def test_start_up_steps_do_not_count_whatever_a_solver_carries_from_step_to_step(solver: iia.Solver) -> None:
    assert not testing.order_misses(testing.measure_orders(solver, [iia.VP()]), solver.order)


@pytest.mark.parametrize(("solver", "cold"), [(AdamsBashforth(), 2), (PredictorCorrector(), 3), (AB2(), 2)])
def test_from_a_cold_start_the_order_is_that_of_the_start_up(solver: iia.Solver, cold: int) -> None:
    measured = measure_order(solver, iia.VP(), TRACKS[0], from_exact_start=False)
    assert all(m.order == pytest.approx(cold, abs=0.3) for m in measured)
    assert not any(m.from_exact_start for m in measured)


# ---- wrong solvers ---------------------------------------------------------------------------------------------------


class Claiming(iia.Solver):
    """Heun's method with another claim."""

    def __init__(self, order: int) -> None:
        self._order = order

    @property
    def order(self) -> int:  # type: ignore[override]
        return self._order

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        return iia.get_solver("heun").step(ode, x, t, s, past)


class TwoStages(iia.Solver):
    """Improved Euler with a second stage at `node`, its slope taken at the time of `clock`, weighted by `weight`."""

    order = 2
    node, clock, weight = 1.0, 1.0, 0.5

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        h, k = s - t, ode.velocity(x, t)
        if ode.is_data(s):
            return x + h * k
        second = ode.velocity(x + self.node * h * k, t + self.clock * h)
        return x + h * ((1 - self.weight) * k + self.weight * second)


class WrongNode(TwoStages):
    """Ralston's weights on the midpoint's node."""

    node, clock, weight = 0.5, 0.5, 0.75


class WrongClock(TwoStages):
    """Right for an autonomous problem only."""

    node, clock, weight = 1.0, 0.0, 0.5


class WrongWeight(TwoStages):
    weight = 0.6


class HalfTheSecondDifference(iia.Solver):
    """The multistep formula of DPM-Solver++ with three outputs, as it is in wide use."""

    order = 3

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        return iia.get_solver("dpmpp_3m").step(ode, x, t, s, past)


class NoAlpha(iia.Solver):
    """DDIM as one writes it where alpha = 1."""

    order = 1

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        ratio = ode.schedule.sigma(s) / ode.schedule.sigma(t)
        return ratio * x + (1 - ratio) * ode.data(x, t)


@pytest.mark.parametrize(
    ("solver", "text"),
    [
        (Claiming(1), r"claims order 1, which is too low: the least measured order is (1\.9|2\.0)\d on VP"),
        (Claiming(3), r"measured order (1\.9|2\.0)\d on VP, gaussian, uniform in t .*, claimed 3"),
        (WrongNode(), r"measured order (0\.9|1\.0)\d on VP.*, claimed 2"),
        (WrongClock(), r"measured order (0\.9|1\.0)\d on VP.*, claimed 2"),
        (WrongWeight(), r"measured order (0\.9|1\.0)\d on VP.*, claimed 2"),
        (HalfTheSecondDifference(), r"measured order (1\.9|2\.0)\d on VP.*, claimed 3"),
        (NoAlpha(), r"measured order -?0\.\d+ on VP.*, claimed 1"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, iia.Solver) else "",
)
def test_an_order_that_is_not_the_claimed_one_is_reported_with_both(solver: iia.Solver, text: str) -> None:
    misses = testing.order_misses(measure_order(solver, iia.VP(), TRACKS[0]), solver.order)
    assert len(misses) >= 1
    with pytest.raises(AssertionError, match=text):
        raise AssertionError(misses[0])


class SlowStart(iia.Solver):
    """Runge-Kutta of order 4 whose start-up, by the midpoint rule, is a part of the run however long that is."""

    order = 4

    def __init__(self, part: int) -> None:
        self.part = part

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        early = past.index * self.part < past.index + 1 + past.remaining
        return iia.get_solver("midpoint" if early else "rk4").step(ode, x, t, s, past)


def test_a_start_up_that_lengthens_with_the_grid_is_no_start_up() -> None:
    misses = testing.order_misses(measure_order(SlowStart(8), iia.EDM(), TRACKS[0], finest_at_least=192), 4)
    with pytest.raises(AssertionError, match=r"measured order 1\.[89]\d on EDM, mixture, uniform in t .*, claimed 4"):
        raise AssertionError("\n".join(misses))


class DormandPrince(iia.RungeKutta):
    """Order 5, with a leading error so small that the next one is seen until rounding."""

    order = 5
    a = (
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    )
    b = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)
    c = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0)


def test_a_high_order_is_not_refused_because_rounding_ends_the_refinement() -> None:
    measured = testing.measure_orders(DormandPrince(), iia.EDM())
    assert not testing.order_misses(measured, 5)
    assert {m.ended for m in measured} >= {"rounding"}
    assert "claimed 6" in testing.order_misses(measured, 6)[0]
    assert "too low" in testing.order_misses(measured, 4)[0]


def test_an_order_that_shows_late_is_followed_to_finer_grids() -> None:
    solver = iia.get_solver("dpm_solver_v3", drop_oldest=True)
    on_gaussian, on_mixture = measure_order(solver, iia.EDM(), TRACKS[0])
    assert on_gaussian.order == pytest.approx(3, abs=0.15)
    assert on_gaussian.counts[-1] > 384
    assert not testing.order_misses([on_gaussian, on_mixture], 3)


def test_slopes_that_have_not_settled_on_the_finest_grid_are_called_so() -> None:
    miss, _ = testing.order_misses([replace(measurement(3.9, 3.5), ended="finest")], 3)
    assert miss.startswith("not asymptotic, the local orders 3.90, 3.50 have not settled")
    miss, _ = testing.order_misses([measurement(3.5, 3.5)], 3)
    assert miss.startswith("measured order 3.50")


@pytest.mark.parametrize("ended", ["settled", "finest"])
def test_only_where_rounding_ends_it_may_a_slope_above_the_claim_not_be_whole(ended: str) -> None:
    at_rounding = replace(measurement(5.6, 5.4), ended="rounding")
    assert at_rounding.agrees_with(5)
    assert not at_rounding.agrees_with(6)
    assert not replace(at_rounding, ended=ended).agrees_with(5)
    assert "too low" in testing.order_misses([at_rounding], 5)[0]  # the claim itself has to be seen


def test_an_order_on_one_schedule_only_is_not_enough() -> None:
    assert not testing.order_misses(measure_order(NoAlpha(), iia.EDM(), TRACKS[0]), 1)
    with pytest.raises(
        iia.errors.ConformanceError, match=r"NoAlpha: order .* tracks \(VP\), claimed 1: measured order -?0\.\d+ on VP"
    ):
        conformance.check_order_is_the_claimed_one(NoAlpha())


class EvaluatesAtData(iia.Solver):
    order = 2

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        d = ode.velocity(x, t)
        return x + (s - t) / 2 * (d + ode.velocity(x + (s - t) * d, s))


class StopsShortOfTheData(iia.Solver):
    """Leaves the state alone on its last step, as if nothing were to be done there."""

    order = 1

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        return x if ode.is_data(s) else iia.get_solver("ddim").step(ode, x, t, s, past)


class ScalesTheData(iia.Solver):
    """Lands beside the data estimate, and is not asked to be consistent."""

    order, consistent = 1, False

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        y = iia.get_solver("ddim").step(ode, x, t, s, past)
        return 1.1 * y if ode.is_data(s) else y


class NeedsLogSNR(iia.Solver):
    """Fails where log-SNR is infinite at the noise end."""

    order = 1

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        if ode.is_data(s):
            return ode.data(x, t)
        h = ode.schedule.lam(s) - ode.schedule.lam(t)
        return math.exp(-h) * x * ode.schedule.alpha(s) / ode.schedule.alpha(t) - ode.schedule.alpha(s) * math.expm1(
            -h
        ) * ode.data(x, t)


class StartsAtTheNoise(iia.Solver):
    """Believes that the first state is pure noise, wherever the grid starts."""

    order, consistent = 1, False

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        return iia.get_solver("ddim").step(ode, x, t if past.index else ode.schedule.t_noise, s, past)


class OnlyForward(iia.Solver):
    order, consistent = 1, False

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        return x - abs(s - t) * ode.velocity(x, t)


class PairsOnly(iia.Solver):
    """Cannot end inside a pair of steps."""

    order = 1

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        if past.index % 2 == 0 and past.remaining == 0:
            raise iia.errors.GridError("an even number of intervals is needed.")
        return iia.get_solver("ddim").step(ode, x, t, s, past)


class WeightsInTheDefaultDtype(iia.Solver):
    order, consistent = 1, False

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        return x + float(torch.tensor(s - t)) * ode.velocity(x, t)


class AnotherOnTensors(iia.Solver):
    order = 1

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        factor = 1.001 if isinstance(x, torch.Tensor) else 1.0
        return x + factor * (s - t) * ode.velocity(x, t)


class EvaluatesMoreWhenTraced(iia.Solver):
    order = 1

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        if not isinstance(x, torch.Tensor):
            ode.data(0.5 * x, t)
        return x + (s - t) * ode.velocity(x, t)


class RemembersOnSelf(iia.Solver):
    """Two-step Adams-Bashforth with its history on the instance; correct as long as nobody else uses it."""

    order = 2

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        history = [(t, ode.velocity(x, t))] + (self.history[:1] if past.index else [])
        self.history = history
        weights = lagrange_weights([u for u, _ in history], t, s)
        return x + sum(w * slope for w, (_, slope) in zip(weights, history, strict=True))


@dataclass(frozen=True)
class OptionNotInJSON(iia.Solver):
    order = 1
    weight: complex = 1j

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        return x + (s - t) * ode.velocity(x, t)


@dataclass(frozen=True)
class OptionThatChanges(iia.Solver):
    """Scales what it is given, each time that it is made."""

    order = 1
    scale: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", 0.5 * self.scale)

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        return x + (s - t) * ode.velocity(x, t) + self.scale * (s - t) ** 2 * ode.velocity(x, t)


class TakesNotesOfTheRun(iia.Solver):
    """Writes the sum of its weights with a factor that depends on the model's answers: no plan."""

    order = 1

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        d = ode.velocity(x, t)
        return x + (s - t) * d * (1.0 if bool(d.sum() > 0) else 2.0)


@pytest.mark.parametrize(
    ("solver", "check", "text"),
    [
        (EvaluatesAtData(), "last_step_lands_on_the_data", "evaluates the model at the data"),
        (
            StopsShortOfTheData(),
            "last_step_lands_on_the_data",
            "to 0 begins 0.0096 from the data and ends 0.0096 from it",
        ),
        (ScalesTheData(), "last_step_lands_on_the_data", "12 steps leave a relative error .* expected half"),
        (NeedsLogSNR(), "pure_noise_is_a_valid_start", "."),
        (StartsAtTheNoise(), "partly_noised_state_is_a_valid_start", "expected half"),
        (OnlyForward(), "encoding_and_decoding_return", "12 steps leave a relative error .* expected half"),
        (
            WrongNode(),
            "encoding_and_decoding_return",
            r"misses the start by .* order (0\.9|1\.0)\d, expected at least 2",
        ),
        (PairsOnly(), "any_number_of_intervals_works", "an even number of intervals is needed"),
        (WeightsInTheDefaultDtype(), "state_keeps_its_dtype", r"in torch.float64, with torch's default"),
        (AnotherOnTensors(), "plan_equals_eager_run", "eager and planned states differ by 0.000"),
        (EvaluatesMoreWhenTraced(), "plan_equals_eager_run", "the plan makes 14 evaluations and an eager run 7"),
        (RemembersOnSelf(), "runs_do_not_share_state", "keep earlier values in the memory that the step returns"),
        (NotHeld(), "memory_does_not_grow", "ode.hold a combination that is carried along"),
        (OptionNotInJSON(), "options_survive_json", "cannot be written as JSON"),
        (OptionThatChanges(), "options_survive_json", "made again from its options"),
        (TakesNotesOfTheRun(), "plan_equals_eager_run", "PlanError: .*symbolic vector"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, iia.Solver) else "",
)
def test_a_broken_promise_is_found_and_explained(solver: iia.Solver, check: str, text: str) -> None:
    found = problem_of(solver, check)
    assert found.startswith(f"{solver.label}: ")
    with pytest.raises(AssertionError, match=text):
        raise AssertionError(found)


def test_what_is_wrong_with_one_promise_leaves_the_others_standing() -> None:
    assert not problem_of(RemembersOnSelf(), "last_step_lands_on_the_data")
    assert not problem_of(WeightsInTheDefaultDtype(), "batch_order_does_not_matter")
    assert not problem_of(WrongNode(), "plan_equals_eager_run")


def test_check_names_all_broken_promises_at_once() -> None:
    with pytest.raises(iia.errors.ConformanceError, match="EvaluatesAtData does not keep") as caught:
        testing.check(EvaluatesAtData())
    assert "- check_last_step_lands_on_the_data: " in str(caught.value)
    assert "- check_partly_noised_state_is_a_valid_start: " in str(caught.value)
    assert "- check_order_is_the_claimed_one: " not in str(caught.value)


# ---- the suite as a tool ---------------------------------------------------------------------------------------------


def test_a_failed_promise_is_an_error_of_the_library_and_a_failed_assertion() -> None:
    assert issubclass(iia.errors.ConformanceError, iia.IIAError)
    assert issubclass(iia.errors.ConformanceError, AssertionError)


def test_every_check_has_a_name_and_says_what_it_promises() -> None:
    names = [check.__name__ for check in testing.CHECKS]
    assert len(set(names)) == len(names)
    assert all(name.startswith("check_") for name in names)
    assert all((check.__doc__ or "").splitlines()[0].endswith(".") for check in testing.CHECKS)


def test_the_suite_does_not_need_pytest() -> None:
    for path in Path(testing.__file__).parent.glob("*.py"):
        imports = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        assert not any("pytest" in ast.unparse(node) for node in imports), path.name


def test_a_solver_without_a_claim_cannot_be_verified() -> None:
    class NoClaim(iia.Solver):
        def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
            return x

    with pytest.raises(iia.errors.InputError, match="attribute `order` of NoClaim must be a whole number"):
        iia.testing.verify(NoClaim())


@pytest.mark.parametrize("claim", [True, 0, -1, 2.0, "2", None])
def test_a_claim_that_is_no_positive_whole_number_is_refused_by_verify_and_check_alike(claim: Any) -> None:
    for call in (iia.testing.verify, testing.check, conformance.check_order_is_the_claimed_one):
        with pytest.raises(
            iia.errors.InputError, match="attribute `order` of Claiming must be a whole number, at least 1, got "
        ):
            call(Claiming(claim))


@pytest.mark.parametrize("schedules", [(), [], "vp", iia.VP, None, 3, [iia.VP(), "edm"]])
def test_an_order_is_not_verified_on_what_is_no_schedule_or_on_none(schedules: Any) -> None:
    for call in (
        lambda: iia.testing.verify("ddim", schedules=schedules),
        lambda: testing.measure_orders("ddim", schedules),
    ):
        with pytest.raises(
            iia.errors.InputError, match=r"schedules must be one schedule or more, such as \[iia_ode.VP\(\)"
        ):
            call()


def test_what_is_no_solver_is_refused() -> None:
    for call in (testing.check, testing.measure_orders, testing.stability_limit, iia.testing.verify):
        with pytest.raises(iia.errors.UnknownNameError, match="heun"):
            call("huen")


# ---- orders ----------------------------------------------------------------------------------------------------------


def measurement(*slopes: float) -> OrderMeasurement:
    counts = (24, 48, 96)[: len(slopes) + 1]
    return OrderMeasurement("mixture", "EDM", "t", True, counts, (0.1,) * len(counts), slopes)


@pytest.mark.parametrize(
    ("slopes", "claimed", "agrees"),
    [
        ((1.7, 2.1), 2, True),
        ((2.1, 1.84), 2, False),
        ((2.0, 2.16), 2, False),  # neither 2 nor 3
        ((3.1, 2.9), 2, True),  # 3: an error term vanishes on this problem
        ((1.1, 1.02), 2, False),
        ((), 4, True),  # exact: rounding from the coarsest grid on
        ((-math.inf, -math.inf), 1, False),  # diverges
    ],
)
def test_a_measured_order_agrees_within_015_or_is_a_higher_whole_one(
    slopes: tuple[float, ...], claimed: int, agrees: bool
) -> None:
    assert measurement(*slopes).agrees_with(claimed) is agrees


def test_an_order_must_be_seen_on_every_schedule_not_only_exceeded() -> None:
    second, third = measurement(2.0, 2.0), measurement(3.0, 3.0)
    assert not testing.order_misses([second, third], 2)
    assert "too low" in testing.order_misses([second, replace(third, schedule="VP")], 2)[0]


def test_the_midpoint_rule_has_order_three_on_gaussians_where_alpha_and_sigma_are_linear_in_t() -> None:
    for schedule, order in ((iia.EDM(), 3), (iia.FlowMatching(), 3), (iia.VP(), 2)):
        on_gaussian, on_mixture = measure_order("midpoint", schedule, TRACKS[0])
        assert on_gaussian.order == pytest.approx(order, abs=0.15)
        assert on_mixture.order == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("track", TRACKS, ids=lambda t: t.name)
def test_grids_of_a_track_are_nested_and_keep_to_their_range(track: Any) -> None:
    coarse, fine = (track.grid(iia.VP(), n) for n in (24, 48))
    torch.testing.assert_close(fine[::2], coarse, rtol=1e-12, atol=0.0)
    levels = [iia.VP().noise_to_signal(float(t)) for t in (coarse[0], coarse[-1])]
    assert levels == pytest.approx([track.low, track.high] if track.encoding else [track.high, track.low])


# ---- stability -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "limit"),
    [
        ("euler", 2.0),
        ("ddim", 2.0),
        ("heun", 2.0),
        ("midpoint", 2.0),
        ("rk4", 2.785293563),
        (AB1(), 2.0),
        (AB2(), 1.0),
        (AB3(), 6 / 11),
        (AdamsBashforth(), 0.3),
    ],
    ids=lambda v: v.name if isinstance(v, iia.Solver) else str(v),
)
def test_the_stability_limit_on_the_negative_real_axis_is_the_classical_one(
    solver: str | iia.Solver, limit: float
) -> None:
    assert testing.stability_limit(solver) == pytest.approx(limit, abs=2e-3)


class Leapfrog(iia.Solver):
    """The explicit two-step midpoint rule: unstable for every decaying solution."""

    order = 2

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        slope = ode.velocity(x, t)
        if not past.memory:
            return x + (s - t) * slope, (x, t)
        before, u = past.memory
        return before + (s - u) * slope, (x, t)


class Implicit(iia.Solver):
    """Backward Euler on this one test problem, by its resolvent: bounded everywhere."""

    order = 1

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        return 0.5 * x


def test_a_method_without_a_stability_interval_has_limit_zero_and_one_without_bound_none() -> None:
    assert testing.stability_limit(Leapfrog()) == pytest.approx(0.0, abs=1e-2)
    assert testing.stability_limit(Implicit()) is None


# ---- the certificate -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def heun() -> tuple[testing.Certificate, str]:
    """The certificate of Heun's method, and what was printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        certificate = iia.testing.verify("heun")
    return certificate, out.getvalue()


def test_the_certificate_of_heun_has_its_textbook_numbers(heun: tuple[testing.Certificate, str]) -> None:
    certificate, _ = heun
    assert certificate.passed
    assert certificate.solver == "heun"
    assert certificate.claimed_order == 2
    assert certificate.only_on == ()
    assert "Covers only" not in str(certificate)
    assert [m.order for m in certificate.orders] == pytest.approx([2.0] * 18, abs=0.05)
    assert [m.order for m in certificate.cold_orders] == pytest.approx([2.0] * 18, abs=0.05)
    assert {(m.schedule, m.problem, m.grid) for m in certificate.orders} == {
        (schedule, problem, grid)
        for schedule in ("EDM", "VP", "FlowMatching")
        for problem in ("gaussian", "mixture")
        for grid in ("t", "log-SNR", "log-SNR, encoding")
    }
    assert certificate.evaluations == (2, 2, 1)
    assert certificate.nfe == 23
    assert certificate.final_step == {
        "EDM": "the model's data estimate",
        "VP": "an Euler step",
        "FlowMatching": "the model's data estimate",
    }
    assert certificate.stability == pytest.approx(2.0, abs=1e-3)
    assert [c.name for c in certificate.checks] == [check.__name__ for check in testing.CHECKS]


def test_a_certificate_is_printed_as_a_table(heun: tuple[testing.Certificate, str]) -> None:
    certificate, printed = heun
    assert printed == f"{certificate}\n"
    lines = printed.splitlines()
    assert lines[0] == f"heun: passed, {len(testing.CHECKS)} of {len(testing.CHECKS)} checks"
    rows = [line for line in lines if line.startswith("  EDM")]
    assert len(rows) == 6
    assert len({len(row) for row in rows}) == 1
    assert "2.00  ok" in rows[0]
    assert "bounded on dx/dt = mu x for h mu in [-2.000, 0]" in printed
    assert not [line for line in lines if "FAILED" in line or line != line.rstrip()]


def test_a_number_that_json_does_not_have_becomes_null(heun: tuple[testing.Certificate, str]) -> None:
    broken = replace(
        heun[0], orders=(measurement(-math.inf, -math.inf),), cold_orders=(measurement(),), options={"w": 1j}
    )
    plain = broken.as_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["orders"][0]["slopes"] == [None, None]
    (row,) = [line for line in str(broken).splitlines() if line.startswith("  EDM")]
    assert row.split()[-3:] == ["none", "FAILED", "exact"]


def test_a_certificate_goes_into_json_and_back(heun: tuple[testing.Certificate, str]) -> None:
    plain = heun[0].as_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["passed"] is True
    assert plain["orders"][0]["slopes"][-1] == pytest.approx(2.0, abs=0.15)
    assert plain["final_step"]["VP"] == "an Euler step"


class ClaimsThreeAndEvaluatesAtData(EvaluatesAtData):
    order = 3


def test_a_wrong_solver_that_cannot_go_to_the_data_gets_a_certificate_that_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = io.StringIO()
    certificate = iia.testing.verify(ClaimsThreeAndEvaluatesAtData(), schedules=iia.VP(), file=out)
    assert capsys.readouterr().out == ""
    assert out.getvalue() == f"{certificate}\n"
    assert not certificate.passed
    assert certificate.only_on == (repr(iia.VP()),)
    assert f"Covers only {iia.VP()!r}\n" in out.getvalue()
    broken = [c.name for c in certificate.checks if c.problem]
    assert {"check_order_is_the_claimed_one", "check_last_step_lands_on_the_data"} <= set(broken)
    kept = len(testing.CHECKS) - len(broken)
    first = out.getvalue().splitlines()[0]
    assert first.startswith(f"{certificate.solver}: FAILED, order ") and " on all 6 tracks, claimed 3; " in first
    assert first.endswith(f"{kept} of {len(testing.CHECKS)} checks passed")
    assert ": measured order 2.0" in out.getvalue()
    assert all(m.schedule == "VP" for m in certificate.orders)
    assert [m.order for m in certificate.orders] == pytest.approx([2.0] * 6, abs=0.15)
    assert certificate.evaluations == (2, 2, 2)
    assert "evaluates the model at the data" in certificate.final_step["VP"]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("ddim", "the model's data estimate"),
        ("euler", "an Euler step"),
        ("midpoint", "a formula of its own"),
        ("denoise_to_zero", "the model's data estimate"),
        ("ab4", "a formula of its own"),
    ],
)
def test_the_step_to_the_data_is_named_for_what_it_is(name: str, what: str) -> None:
    assert testing.certificate.final_step(iia.get_solver(name), iia.VP()) == what
