"""Several networks by level, and guidance with an interval or rescaled: outputs, records and bad use."""

import pytest
import torch
from support import EPS, F64, Recorder, close, normal
from torch import Tensor, nn

import iia_ode as iia
from iia_ode import ProbabilityFlowODE
from iia_ode.errors import InputError, MismatchError, MismatchWarning
from iia_ode.ode import Interval, by_level, cached

FLOW = iia.FlowMatching()
SWITCH = FLOW.noise_to_signal(0.5)
GRID = torch.tensor([0.95, 0.7, 0.5, 0.2, 0.0], dtype=F64)


class Scaled(nn.Module):
    """A network that multiplies and counts its calls."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor, self.calls = nn.Parameter(torch.tensor(factor, dtype=F64)), 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return self.factor * x + t[:, None]


def experts(schedule: iia.Schedule = FLOW, switch: float = SWITCH) -> tuple[Scaled, Scaled, ProbabilityFlowODE]:
    low, high = Scaled(0.5), Scaled(-0.3)
    return low, high, ProbabilityFlowODE(by_level({0.0: low, switch: high}), schedule, "velocity")


# ---- networks by level -----------------------------------------------------------------------------------------------


def test_each_level_has_its_network_and_a_range_includes_its_lowest_level():
    low, high, ode = experts()
    x = normal(3, 2)
    for t, factor in ((0.2, 0.5), (0.499, 0.5), (0.5, -0.3), (0.9, -0.3)):
        close(ode.output(x, t), factor * x + t, atol=1e-15)
    assert (low.calls, high.calls) == (2, 2)
    assert ode.nfe == 4


@pytest.mark.parametrize("schedule", [iia.FlowMatching(reverse=True), iia.VP(), iia.EDM()], ids=repr)
def test_levels_choose_the_network_on_every_schedule(schedule):
    _, _, ode = experts(schedule, 0.7)
    x = normal(3, 2)
    for level, factor in ((0.1, 0.5), (0.7, -0.3), (3.0, -0.3)):
        t = schedule.t_of_noise_to_signal(level)
        close(ode.output(x, t), factor * x + t, atol=1e-15)


def test_a_sampler_switches_networks_on_the_way():
    low, high, ode = experts()
    iia.sample(ode, normal(3, 2), GRID, "euler")
    assert (high.calls, low.calls) == (3, 1)


def test_times_per_sample_choose_per_sample():
    low, high, ode = experts()
    x, t = normal(3, 2), torch.tensor([0.2, 0.5, 0.9], dtype=F64)
    factors = torch.tensor([0.5, -0.3, -0.3], dtype=F64)
    close(ode.output(x, t), factors[:, None] * x + t[:, None], atol=1e-15)
    ode.output(x, torch.full((3,), 0.2, dtype=F64))
    assert (low.calls, high.calls) == (2, 1)  # one range, one network


def test_transforms_and_graphs_see_the_chosen_network():
    _, _, ode = experts()
    x, every = normal(3, 2), torch.tensor([0.2, 0.9], dtype=F64)
    both = torch.func.vmap(lambda t: ode.output(x, t))(every)
    close(both, torch.stack([ode.output(x, t) for t in every.tolist()]), atol=1e-15)
    slope = torch.func.jacrev(lambda t: ode.output(x, t))(torch.tensor(0.9, dtype=F64))
    close(slope, torch.ones(3, 2, dtype=F64))


def test_guided_networks_by_level_share_one_call():
    low, high = Recorder(), Recorder()
    ode = ProbabilityFlowODE(
        by_level({0.0: low, SWITCH: high}),
        FLOW,
        "velocity",
        conditioning={"c": torch.ones(3, dtype=F64)},
        unconditional={"c": torch.zeros(1, dtype=F64)},
        guidance_scale=2.0,
    )
    x = normal(3, 2)
    close(ode.output(x, torch.tensor([0.2, 0.9, 0.9], dtype=F64)), 0.5 * x + 2.0)
    assert [len(calls) for calls in (low.calls, high.calls)] == [1, 1]
    assert len(low.calls[0]["x"]) == 6


def test_the_fingerprint_covers_every_network_and_the_levels():
    same, other = experts()[2].fingerprint(), experts()[2].fingerprint()
    assert same == other
    assert same.known
    low, high, ode = experts()
    high.factor.data.add_(1e-3)
    assert ode.fingerprint() != same
    assert experts(switch=2.0)[2].fingerprint() != same
    assert ProbabilityFlowODE(low, FLOW, "velocity").fingerprint() != same
    assert cached(experts()[2]).fingerprint() == same


def test_the_networks_are_parts_of_the_ode():
    _, _, ode = experts()
    assert len(list(ode.parameters())) == 2
    assert {p.dtype for p in ode.float().parameters()} == {torch.float32}
    assert ode.model.levels == (0.0, SWITCH)


@pytest.mark.parametrize(
    ("networks", "text"),
    [
        ({1.0: Scaled(1.0)}, "begin at 0"),
        ({}, "begin at 0"),
        ({0.0: Scaled(1.0), 1.0: 3}, "takes networks by the lowest level"),
        ({"low": Scaled(1.0)}, "are numbers"),
        ([Scaled(1.0)], "takes networks by the lowest level"),
    ],
)
def test_levels_that_leave_a_gap_and_networks_that_are_none_are_input_errors(networks, text):
    with pytest.raises(InputError, match=text):
        by_level(networks)


def test_networks_that_are_told_different_times_are_no_single_model():
    one, other = Scaled(1.0), Scaled(1.0)
    one.model_time, other.model_time = "sigma", "1000 sigma"
    with pytest.raises(InputError, match="different values of model_time"):
        by_level({0.0: one, 1.0: other})


def test_a_choice_of_networks_inside_another_module_says_where_it_belongs():
    model = by_level({0.0: Scaled(1.0), 1.0: Scaled(2.0)})
    with pytest.raises(InputError, match="pass this model to ProbabilityFlowODE"):
        ProbabilityFlowODE(lambda x, t: model(x, t), FLOW).output(normal(3, 2), 0.5)


# ---- guidance --------------------------------------------------------------------------------------------------------

C, NULL = torch.tensor([1.0, -2.0, 3.0], dtype=F64), torch.zeros(1, dtype=F64)


class Tilted(nn.Module):
    """An output whose spread within a sample depends on the condition."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5, dtype=F64))
        self.calls: list[int] = []

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        self.calls.append(len(x))
        return self.scale * x * (1 + c[:, None, None, None])


def guided(model: nn.Module | None = None, **options: object) -> ProbabilityFlowODE:
    values = {"conditioning": {"c": C}, "unconditional": {"c": NULL}, "guidance_scale": 4.0, **options}
    return ProbabilityFlowODE(model or Tilted(), iia.EDM(), **values)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_rescaled_guidance_has_the_spread_of_the_condition(share, together):
    x = normal(3, 1, 4, 4)
    ode = guided(guidance_rescale=share, batched_guidance=together)
    condition, null = ode.branches(x, 1.0)
    by_hand = null + 4 * (condition - null)
    axes = [1, 2, 3]
    ratio = condition.std(axes, keepdim=True) / by_hand.std(axes, keepdim=True)
    close(ode.output(x, 1.0), share * by_hand * ratio + (1 - share) * by_hand, rtol=64 * EPS)


def test_rescaling_without_guidance_changes_nothing_and_costs_nothing():
    model, x = Tilted(), normal(3, 1, 4, 4)
    out = guided(model, guidance_scale=1.0, guidance_rescale=0.7).output(x, 1.0)
    assert model.calls == [3]
    close(out, guided(guidance_scale=1.0).output(x, 1.0))


def test_a_constant_output_is_left_as_it_is():
    ode = guided(lambda x, t, c: torch.ones_like(x) * (1 + c[:, None, None, None]), guidance_rescale=0.7)
    assert ode.output(normal(3, 1, 4, 4), 1.0).isfinite().all()


def test_rescaling_and_a_scale_per_sample_survive_views_and_wrappers():
    x = normal(3, 1, 4, 4)
    ode = guided(guidance_rescale=0.7, guidance_scale=torch.tensor([1.5, 2.0, 7.0], dtype=F64))
    want = ode.output(x, 1.0)
    close(cached(ode).output(x, 1.0), want)
    close(ode.subset(slice(1, 3), 3).output(x[1:], 1.0), want[1:])
    close(ode.condition(c=C).output(x, 1.0), want)


@pytest.mark.parametrize("share", [-0.1, 1.5, "a half"])
def test_the_share_of_rescaling_is_between_0_and_1(share):
    with pytest.raises(InputError, match="guidance_rescale"):
        guided(guidance_rescale=share)


def test_a_fit_records_its_rescaling_and_warns_about_another_one(tmp_path):
    grid = iia.grids.karras(3)
    x = 80 * normal(24, 1, 2, 2)
    ode = guided(guidance_rescale=0.7, conditioning={"c": torch.linspace(-1, 1, 24, dtype=F64)})
    fit = iia.load(iia.preset("iia-ddim").fit(ode, x, grid).save(tmp_path / "fit.safetensors"))
    assert fit.record.origin.guidance_rescale == 0.7
    assert "guidance scale 4 rescaled by 0.7" in str(fit)
    iia.sample(ode, x, solver=fit)
    plain = guided(conditioning=ode.conditioning)
    with pytest.warns(MismatchWarning, match=r"for guidance_rescale 0.7, and this ODE has 0"):
        iia.sample(plain, x, solver=fit)
    teacher = iia.Teacher.for_grid(ode, x, grid, steps=8)
    with pytest.raises(MismatchError, match="guidance_rescale"):
        teacher.check(plain, x)


def test_an_interval_guides_between_its_levels_and_nowhere_else():
    schedule, model = iia.VP(), Tilted()
    ode = ProbabilityFlowODE(
        model,
        schedule,
        conditioning={"c": C},
        unconditional={"c": NULL},
        guidance_scale=Interval(3.0, 0.5, 2.0, schedule),
    )
    x, plain = normal(3, 1, 4, 4), 0.5 * (1 + C[:, None, None, None])
    for level, w in ((0.3, 1.0), (1.0, 3.0), (1.9, 3.0), (2.1, 1.0)):
        t = schedule.t_of_noise_to_signal(level)
        close(ode.output(x, t), x * (0.5 + w * (plain - 0.5)), rtol=1e-14)
        close(ode.output(x, torch.tensor(t, dtype=F64)), x * (0.5 + w * (plain - 0.5)), rtol=1e-14)
    assert model.calls == [3, 6, 6, 6, 6, 6, 3, 6]  # a number outside of the interval costs one plain call


def test_a_fit_records_the_scales_of_an_interval():
    schedule = iia.EDM()
    ode = guided(
        guidance_scale=Interval(3.0, 0.5, 2.0, schedule), conditioning={"c": torch.linspace(-1, 1, 24, dtype=F64)}
    )
    fit = iia.preset("iia-ddim").fit(ode, 80 * normal(24, 1, 2, 2), iia.grids.karras(3))
    assert fit.record.origin.guidance_scale.range == (1.0, 3.0)


@pytest.mark.parametrize("levels", [(2.0, 0.5), (-1.0, 2.0), (0.5, "high")])
def test_an_interval_of_guidance_is_in_order(levels):
    with pytest.raises(InputError, match=r"low|levels"):
        Interval(3.0, *levels, iia.EDM())
    with pytest.raises(InputError, match="schedule of the ODE"):
        Interval(3.0, 0.5, 2.0, "edm")
