"""What a model is told about the time: names, functions and whole numbers, through every wrapper and into files."""

import math

import pytest
import torch
import torchdiffeq
from emulated import DEVICE, chip
from support import ALPHAS_CUMPROD, F64, close, normal
from torch import Tensor, nn

import iia_ode as iia
from iia_ode import ProbabilityFlowODE
from iia_ode.errors import InputError, MismatchWarning, UnknownNameError
from iia_ode.ode import Wrapped, by_level, cached
from iia_ode.ode.clock import TIMES, Told
from iia_ode.ode.distributed import Distributed

FLOW = iia.FlowMatching()
GRID = torch.tensor([0.95, 0.7, 0.4, 0.1, 0.0], dtype=F64)


class Hears(nn.Module):
    """A velocity that depends on what the model is told, and a list of it."""

    def __init__(self, unit: float = 1.0, dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.scale, self.unit = nn.Parameter(torch.tensor(0.5, dtype=dtype)), unit
        self.heard: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.heard.append(t.detach())
        return self.scale * x * (t / self.unit).sin()[:, None].to(x.dtype)


def heard(schedule: iia.Schedule, t: Tensor | float, **options: object) -> Tensor:
    model = Hears()
    ProbabilityFlowODE(model, schedule, **options).output(normal(3, 2), t)
    return model.heard[0]


@pytest.mark.parametrize(
    ("name", "schedule", "t", "value"),
    [
        ("index", iia.Discrete(ALPHAS_CUMPROD), 412.5, 412.5),
        ("sigma", FLOW, 0.3, 0.3),
        ("sigma", iia.VP(), 0.3, iia.VP().sigma(0.3)),
        ("1000 sigma", FLOW, 0.3, 300.0),
        ("1 - sigma", FLOW, 0.3, 0.7),
        ("c_noise", iia.EDM(), 5.0, math.log(5.0) / 4),
        ("c_noise", iia.Cosine(), 0.5, 0.0),
    ],
)
def test_a_name_says_what_the_model_is_told(name, schedule, t, value):
    for at in (t, torch.tensor(t, dtype=F64), torch.full((3,), t, dtype=F64)):
        got = heard(schedule, at, time=name)
        assert got.shape == (3,)
        close(got, torch.full((3,), value, dtype=F64), atol=1e-12)


def test_every_name_is_described_where_the_option_is():
    assert all(f'``"{name}"``' in (ProbabilityFlowODE.__doc__ or "") for name in TIMES)


def test_by_default_the_model_is_told_the_time_of_the_schedule_or_what_it_asks_for():
    assert heard(FLOW, 0.3).tolist() == [0.3] * 3
    model = Hears()
    model.model_time = "1000 sigma"
    ode = ProbabilityFlowODE(model, FLOW)
    assert ode.settings["time"] == "1000 sigma"
    assert ProbabilityFlowODE(model, FLOW, time="sigma").time == "sigma"


def test_a_function_receives_times_in_float64_with_a_batch_axis():
    asked: list[Tensor] = []

    def doubled(t: Tensor) -> Tensor:
        asked.append(t)
        return 2 * t

    for t in (0.3, torch.tensor(0.3, dtype=F64), torch.tensor([0.1, 0.2, 0.3], dtype=F64)):
        got = heard(FLOW, t, time=doubled)
        close(got, 2 * torch.as_tensor(t, dtype=F64).expand(3))
    assert [(v.dtype, tuple(v.shape)) for v in asked] == [(F64, (1,)), (F64, (1,)), (F64, (3,))]


def test_whole_numbers_of_a_function_stay_whole_numbers():
    got = heard(iia.Discrete(ALPHAS_CUMPROD), 411.6, time=lambda t: t.round().long())
    assert got.dtype == torch.int64
    assert got.tolist() == [412] * 3


@pytest.mark.parametrize(("rounding", "values"), [("nearest", [413.0, 412.0, 0.0]), ("floor", [412.0, 412.0, 0.0])])
def test_whole_timesteps_on_request(rounding, values):
    times = torch.tensor([412.6, 412.0 - 1e-9, 0.2], dtype=F64)
    schedule = iia.Discrete(ALPHAS_CUMPROD)
    assert heard(schedule, times, time="index", time_rounding=rounding).tolist() == values
    each = [heard(schedule, t, time_rounding=rounding)[0].item() for t in times.tolist()]
    assert each == values


def test_models_in_half_precision_are_told_the_time_in_float32():
    model = Hears(1000.0, torch.bfloat16)
    ProbabilityFlowODE(model, FLOW, time="1000 sigma").output(normal(3, 2).float(), 0.8605)
    assert model.heard[0].dtype == torch.float32
    close(model.heard[0], torch.full((3,), 860.5))


# ---- through the library ---------------------------------------------------------------------------------------------


class Clamped(Wrapped):
    """A wrapper."""

    def output(self, x: Tensor, t: Tensor | float) -> Tensor:
        return self.inner.output(x, t).clamp(-9, 9)


def ode_of(**options: object) -> ProbabilityFlowODE:
    return ProbabilityFlowODE(Hears(1000.0), FLOW, "velocity", **options)


def by_hand() -> ProbabilityFlowODE:
    model = Hears(1000.0)
    return ProbabilityFlowODE(lambda x, t: model(x, 1000 * t), FLOW, "velocity")


@pytest.mark.parametrize(
    "change",
    [lambda ode: ode, Clamped, cached, lambda ode: cached(Clamped(ode)), lambda ode: ode.subset(slice(0, 5), 5)],
    ids=["plain", "wrapped", "cached", "both", "subset"],
)
def test_wrapped_cached_and_cut_odes_tell_the_model_the_same(change):
    x = normal(5, 2)
    want = iia.sample(by_hand(), x, GRID, "dpmpp_2m")
    close(iia.sample(change(ode_of(time="1000 sigma")), x, GRID, "dpmpp_2m"), want, rtol=1e-12)


class Alone:
    """The processes of a group of one."""

    size, rank, on_host = 1, 0, True

    def share(self, samples: int, rank: int | None = None) -> slice:
        return slice(0, samples)

    def rows(self, own: Tensor, samples: int, *call: object) -> Tensor:
        return own

    def meet(self, *call: object) -> None:
        """One process agrees with itself."""


def test_a_distributed_ode_tells_its_model_the_same():
    x = normal(5, 2)
    ode = ode_of(time="1000 sigma", time_rounding="nearest")
    shared = Distributed(ode, Alone())
    assert (shared.time, shared.time_rounding) == ("1000 sigma", "nearest")
    close(iia.sample(shared, x, GRID, "dpmpp_2m"), iia.sample(ode, x, GRID, "dpmpp_2m"))


class OnChip(nn.Module):
    """A float32 network for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        assert t.dtype == torch.float32
        return self.scale * x * (t / 1000).sin()[:, None]


@pytest.mark.parametrize("rounding", [None, "nearest"])
def test_a_device_without_float64_is_told_the_same(rounding):
    x, grid = normal(5, 2).float(), torch.tensor([0.95, 0.7, 0.4, 0.1], dtype=F64)

    def run(device: torch.device | str, time: object, solver: str, **options: object) -> Tensor:
        model = by_level({0.0: OnChip(), 1.0: OnChip()}).to(device)
        ode = ProbabilityFlowODE(model, FLOW, "velocity", time=time, time_rounding=rounding)
        return iia.sample(ode, x.to(device), grid, solver, **options).detach().cpu()

    for time in ("1000 sigma", lambda t: 1000 * t):
        for solver in ("dpmpp_2m", "torchdiffeq:rk4"):
            want = run("cpu", time, solver)
            with chip():
                close(run(DEVICE, time, solver), want, rtol=1e-5, atol=1e-6)


def test_torchdiffeq_and_references_tell_the_model_the_same():
    x, times = normal(5, 2), torch.tensor([0.9, 0.2], dtype=F64)
    ode, own = ode_of(time="1000 sigma"), by_hand()
    close(
        torchdiffeq.odeint(ode, x, times, rtol=1e-7, atol=1e-7),
        torchdiffeq.odeint(own, x, times, rtol=1e-7, atol=1e-7),
        rtol=1e-10,
    )
    ours, theirs = (iia.reference.solve(o, x, 0.9, 0.5) for o in (ode, own))
    close(ours, theirs, rtol=1e-8)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # of torch.func itself
def test_derivatives_by_state_and_time_pass_through_a_told_time():
    x, t = normal(3, 2), torch.tensor(0.4, dtype=F64)
    ode, own = ode_of(time="1000 sigma"), by_hand()
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        for argument in (0, 1):
            ours, theirs = (transform(lambda u, s, o=o: o.output(u, s), argnums=argument)(x, t) for o in (ode, own))
            close(ours, theirs, rtol=1e-12)
    every = torch.linspace(0.1, 0.9, 4, dtype=F64)
    ours, theirs = (torch.func.vmap(lambda s, o=o: o.output(x, s))(every) for o in (ode, own))
    close(ours, theirs, rtol=1e-12)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # of torch.func itself
def test_a_rounded_time_has_the_derivative_of_the_smooth_time():
    x, t = normal(3, 2), torch.tensor(0.4, dtype=F64)
    smooth, rounded = (ode_of(time="1000 sigma", time_rounding=r) for r in (None, "nearest"))
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        ours, theirs = (transform(lambda s, o=o: o.output(x, s))(t) for o in (rounded, smooth))
        close(ours, theirs, rtol=1e-12)
    u = t.clone().requires_grad_(True)
    assert torch.autograd.grad(rounded.output(x, u).sum(), u)[0] != 0


def test_a_compiled_model_is_told_the_time_in_one_graph():
    ode, x = ode_of(time="1000 sigma", time_rounding="nearest"), normal(3, 2)
    ode.model.heard = None
    ode.model.forward = lambda x, t: ode.model.scale * x * (t / 1000).sin()[:, None]
    graph = torch.compile(lambda u: ode.output(u, 0.4), backend="eager", fullgraph=True)
    close(graph(x), ode.output(x, 0.4))


# ---- records ---------------------------------------------------------------------------------------------------------


def fitted(ode: ProbabilityFlowODE) -> iia.FittedSolver:
    return iia.preset("iia-ddim").fit(ode, normal(32, 2), GRID)


def test_a_file_says_what_the_model_was_told(tmp_path):
    fit = fitted(ode_of(time="1000 sigma", time_rounding="floor"))
    again = iia.load(fit.save(tmp_path / "fit.safetensors"))
    assert again.record.origin.time == Told("1000 sigma", "floor")
    assert "told 1000 sigma, whole numbers" in str(again)


def test_a_fit_with_exact_times_serves_rounded_times_and_an_equal_function():
    fit, x = fitted(ode_of(time="1000 sigma")), normal(4, 2)
    iia.sample(ode_of(time="1000 sigma", time_rounding="nearest"), x, solver=fit)
    iia.sample(ode_of(time=lambda t: 1000 * t), x, solver=fit)


@pytest.mark.parametrize("other", [None, "sigma", lambda t: 999 * t], ids=["t", "sigma", "function"])
def test_a_fit_for_another_told_time_warns(other):
    fit, x = fitted(ode_of(time="1000 sigma")), normal(4, 2)
    with pytest.warns(MismatchWarning, match="told the time 1000 sigma, and this ODE tells its model"):
        iia.sample(ode_of(time=other), x, solver=fit)


def test_the_same_time_under_two_names_is_the_same_time():
    fit, x = fitted(ode_of(time="sigma")), normal(4, 2)
    iia.sample(ode_of(), x, solver=fit)


# ---- bad use ---------------------------------------------------------------------------------------------------------


def test_an_unknown_name_is_answered_with_the_names():
    with pytest.raises(UnknownNameError, match="1000 sigma"):
        heard(FLOW, 0.3, time="1000sigma")
    with pytest.raises(UnknownNameError, match="nearest"):
        heard(FLOW, 0.3, time_rounding="round")


def test_a_time_is_a_name_or_a_function():
    with pytest.raises(InputError, match="time must be None, one of 'index'"):
        heard(FLOW, 0.3, time=1000)


def test_an_index_needs_a_schedule_with_timesteps():
    with pytest.raises(InputError, match="the schedule is FlowMatching: use Discrete"):
        heard(FLOW, 0.3, time="index")


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda t: t[:, None], r"a tensor \[B\] of real numbers, got a tensor \[1, 1\] for \[1\]"),
        (lambda t: 3.0, "got 3.0"),
        (lambda t: t.nothing, "AttributeError"),
    ],
    ids=["shape", "number", "fails"],
)
def test_a_function_that_makes_no_times_is_an_input_error(function, text):
    with pytest.raises(InputError, match=text):
        heard(FLOW, 0.3, time=function)
