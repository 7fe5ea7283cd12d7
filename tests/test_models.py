"""Networks of other libraries as models in one line, against the loops that these libraries write."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from support import F64, close, normal
from torch import Tensor, nn

import iia_ode as iia
from iia_ode import ProbabilityFlowODE
from iia_ode.denoisers import EDMDenoiser
from iia_ode.errors import InputError

SIGMAS = iia.grids.karras(7)
LABELS = torch.eye(3, dtype=F64)


class Raw(nn.Module):
    """A raw network F(x, c_noise, class_labels) with random weights."""

    def __init__(self, dtype: torch.dtype = F64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.label = nn.Linear(4, 4).to(dtype), nn.Linear(3, 4).to(dtype)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        h = self.mix(x) + t[:, None].to(x.dtype).sin()
        return (h if class_labels is None else h + self.label(class_labels.to(x.dtype))).tanh()


class NVlabs(nn.Module):
    """The interface of EDM's networks: net(x, sigma, class_labels), with levels rounded to a table."""

    def __init__(self, dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.model, self.sigma_data = Raw(dtype), 0.5
        self.register_buffer("u", torch.linspace(0, 11, 400, dtype=F64).exp() * 2e-3 - 1e-3)

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, force_fp32: bool = False) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        s = sigma.to(wide).reshape(-1, 1)
        c_skip, c_in = 0.25 / (s**2 + 0.25), 1 / (s**2 + 0.25).sqrt()
        raw = self.model((c_in * x).to(x.dtype), s.flatten().log() / 4, class_labels)
        return c_skip * x + s * 0.5 * c_in * raw.to(wide)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        nearest = torch.cdist(sigma.to(F64).reshape(1, -1, 1), self.u.to(F64).reshape(1, -1, 1)).argmin(2)
        return self.u.to(F64)[nearest.flatten()].reshape(sigma.shape)


@torch.no_grad()
def heun_of_edm(net: Any, x: Tensor, sigmas: Tensor, **extra: Any) -> Tensor:
    """The deterministic sampler of Karras et al. [2022, algorithm 1]."""
    for s, s_next in pairwise(sigmas):
        d = (x - net(x, s.expand(len(x)), **extra)) / s
        y = x + (s_next - s) * d
        if s_next > 0:
            d = (d + (y - net(y, s_next.expand(len(x)), **extra)) / s_next) / 2
            y = x + (s_next - s) * d
        x = y
    return x


def test_an_edm_network_is_a_model_in_one_line():
    net, x = NVlabs(), 80 * normal(3, 4)
    ode = ProbabilityFlowODE(net, iia.EDM(), "data", conditioning={"class_labels": LABELS})
    close(iia.sample(ode, x, SIGMAS, "heun"), heun_of_edm(net, x, SIGMAS, class_labels=LABELS), rtol=1e-12)


def test_levels_of_an_edm_network_are_rounded_in_the_grid_or_in_what_the_model_is_told():
    net, x = NVlabs(), 80 * normal(3, 4)
    grid = torch.cat([net.round_sigma(SIGMAS[:-1]), SIGMAS[-1:]])
    ode = ProbabilityFlowODE(net, iia.EDM(), "data")
    close(iia.sample(ode, x, grid, "heun"), heun_of_edm(net, x, grid), rtol=1e-12)
    told = ProbabilityFlowODE(net, iia.EDM(), "data", time=net.round_sigma)
    close(told.output(x, 3.0), net(x, net.round_sigma(torch.full((3,), 3.0))))


def test_an_edm_network_in_half_precision_keeps_the_state_in_float32():
    net, x = NVlabs(torch.float16), 80 * normal(3, 4).float()
    ode = ProbabilityFlowODE(net, iia.EDM(), "data")
    out = iia.sample(ode, x, SIGMAS, "heun")
    assert out.dtype == torch.float32
    close(out, heun_of_edm(NVlabs(torch.float32), x, SIGMAS.float()), atol=2e-2, rtol=0)


def dpmpp_2m_of_k_diffusion(model: Any, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any]) -> Tensor:
    """DPM-Solver++(2M) in the noise levels of k-diffusion."""
    old = None
    for i, (s, s_next) in enumerate(pairwise(sigmas)):
        denoised = model(x, s.expand(len(x)), **extra_args)
        if s_next == 0 or old is None:
            x = s_next / s * x + (1 - s_next / s) * denoised
        else:
            h, h_last = (s / s_next).log(), (sigmas[i - 1] / s).log()
            ahead = denoised + h / (2 * h_last) * (denoised - old)
            x = s_next / s * x - torch.expm1(-h) * ahead
        old = denoised
    return x


class CFGDenoiser(nn.Module):
    """The guidance of k-diffusion: both branches in one batch, null first."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, sigma: Tensor, uncond: Tensor, cond: Tensor, cond_scale: float) -> Tensor:
        both = self.inner(torch.cat([x, x]), torch.cat([sigma, sigma]), class_labels=torch.cat([uncond, cond]))
        null, condition = both.chunk(2)
        return null + (condition - null) * cond_scale


@torch.no_grad()
def test_a_denoiser_of_k_diffusion_is_a_model_with_its_extra_arguments():
    net, x = NVlabs(), 80 * normal(3, 4)
    null = torch.zeros(3, 3, dtype=F64)
    extra = {"uncond": null, "cond": LABELS, "cond_scale": 4.0}
    want = dpmpp_2m_of_k_diffusion(CFGDenoiser(net), x, SIGMAS, extra)
    wrapped = ProbabilityFlowODE(CFGDenoiser(net), iia.EDM(), conditioning=extra)
    close(iia.sample(wrapped, x, SIGMAS, "dpmpp_2m"), want, rtol=1e-11)
    own = ProbabilityFlowODE(
        net,
        iia.EDM(),
        conditioning={"class_labels": LABELS},
        unconditional={"class_labels": null[:1]},
        guidance_scale=4.0,
    )
    close(iia.sample(own, x, SIGMAS, "dpmpp_2m"), want, rtol=1e-11)


@torch.no_grad()
def test_a_raw_network_is_a_model_by_its_preconditioning():
    raw, x = Raw(), 80 * normal(3, 4)
    ode = ProbabilityFlowODE(EDMDenoiser(raw, sigma_data=0.5), iia.EDM(), conditioning={"class_labels": LABELS})
    y = x
    for s, s_next in pairwise(SIGMAS.tolist()):
        size = math.hypot(s, 0.5)
        f = raw(y / size, torch.full((3,), math.log(s) / 4, dtype=F64), LABELS)
        y = y + (s_next - s) * (y - (0.25 / size**2 * y + s * 0.5 / size * f)) / s
    close(iia.sample(ode, x, SIGMAS, "euler"), y, rtol=1e-11)
    close(EDMDenoiser(raw)(x, torch.full((3,), 2.0)), NVlabs()(x, torch.full((3,), 2.0)), rtol=1e-6)
    assert ode.fingerprint() == ProbabilityFlowODE(raw, iia.EDM()).fingerprint()


def test_a_raw_network_of_any_shape_needs_no_labels_and_is_not_stored():
    denoiser = EDMDenoiser(nn.Identity())
    with pytest.raises(TypeError):
        denoiser(normal(2, 3), torch.ones(2))  # nn.Identity takes no second argument
    assert EDMDenoiser(Raw())(normal(2, 4), torch.ones(2)).shape == (2, 4)
    with pytest.raises(InputError, match="the network is a Raw"):
        _ = EDMDenoiser(Raw()).config


@torch.no_grad()
def test_a_v_network_told_a_quarter_of_the_log_level_is_a_model_on_the_cosine_schedule():
    """Stable Video Diffusion: v prediction of x / sqrt(1 + sigma^2), Euler in the levels."""
    raw, levels = Raw(), iia.grids.karras(7, 0.002, 700.0)
    ode = ProbabilityFlowODE(raw, iia.Cosine(known_levels=(0.002, 700.0)), "v", time="c_noise")
    x = y = 700 * normal(3, 4)
    for s, s_next in pairwise(levels.tolist()):
        size = math.hypot(s, 1.0)
        v = raw(y / size, torch.full((3,), math.log(s) / 4, dtype=F64))
        y = y + (s_next - s) * (y - (y / size**2 - s / size * v)) / s
    grid = iia.grids.karras(7, 0.002, 700.0, schedule=ode.schedule)
    close(iia.sample(ode, x / math.hypot(700.0, 1.0), grid, "ddim"), y, rtol=1e-9)


@torch.no_grad()
def test_a_score_network_is_a_model_on_its_sde():
    """Song et al. [2021]: a VP network is told 999 t and predicts noise; a VE network is told sigma and predicts the score."""
    raw, schedule = Raw(), iia.VP()
    ode = ProbabilityFlowODE(raw, schedule, "noise", time=lambda t: 999 * t)
    grid = torch.linspace(1.0, 1e-3, 9, dtype=F64)
    x = y = normal(3, 4)
    for t, t_next in pairwise(grid.tolist()):
        beta = 0.1 + 19.9 * t
        score = -raw(y, torch.full((3,), 999 * t, dtype=F64)) / schedule.sigma(t)
        y = y + (t_next - t) * (-0.5 * beta * (y + score))
    close(iia.sample(ode, x, grid, "euler"), y, rtol=1e-10)
    ve = ProbabilityFlowODE(raw, iia.EDM(), "score")
    levels = iia.grids.karras(7, 0.5, 80.0, to_data=False)
    x = y = 80 * normal(3, 4)
    for s, s_next in pairwise(levels.tolist()):
        y = y - (s_next - s) * s * raw(y, torch.full((3,), s, dtype=F64))
    close(iia.sample(ve, x, levels, "euler"), y, rtol=1e-10)


@pytest.mark.parametrize(
    ("time", "schedule", "tell", "sign"),
    [
        ("1000 sigma", iia.FlowMatching(), lambda sigma: 1000 * sigma, 1.0),  # Stable Diffusion 3, Wan
        ("sigma", iia.FlowMatching(), lambda sigma: sigma, 1.0),  # Flux
        (None, iia.FlowMatching(reverse=True), lambda sigma: 1 - sigma, -1.0),  # Z-Image, Lumina 2
    ],
    ids=["1000 sigma", "sigma", "reversed"],
)
@torch.no_grad()
def test_flow_models_are_told_their_own_time(time, schedule, tell, sign):
    raw, sigmas = Raw(), torch.tensor([1.0, 0.9, 0.6, 0.3, 0.0], dtype=F64)
    ode = ProbabilityFlowODE(raw, schedule, "velocity", time=time)
    x = y = normal(3, 4)
    for s, s_next in pairwise(sigmas.tolist()):
        y = y + (s_next - s) * sign * raw(y, torch.full((3,), tell(s), dtype=F64))
    grid = 1 - sigmas if schedule.reverse else sigmas
    close(iia.sample(ode, x, grid, "euler"), y, rtol=1e-12)


@torch.no_grad()
def test_two_transformers_of_one_model_share_the_levels_at_the_boundary():
    """Wan 2.2: one network from 1000 sigma = 875 on, another one below, each with a guidance scale of its own."""
    torch.manual_seed(1)
    low, high, flow = Raw(), Raw(), iia.FlowMatching()
    high.mix.weight.mul_(-1)
    model = iia.ode.by_level({0.0: low, flow.noise_to_signal(0.875): high})
    ode = ProbabilityFlowODE(
        model,
        flow,
        "velocity",
        time="1000 sigma",
        conditioning={"class_labels": LABELS},
        unconditional={"class_labels": torch.zeros(1, 3, dtype=F64)},
        guidance_scale=lambda t: 3.0 if t >= 0.875 else 4.0,
    )
    sigmas = torch.tensor([1.0, 0.95, 0.875, 0.6, 0.3, 0.0], dtype=F64)
    x = y = normal(3, 4)
    for s, s_next in pairwise(sigmas.tolist()):
        net, w, t = (high, 3.0, 1000 * s) if 1000 * s >= 875 else (low, 4.0, 1000 * s)
        null, condition = (net(y, torch.full((3,), t, dtype=F64), c) for c in (torch.zeros(3, 3, dtype=F64), LABELS))
        y = y + (s_next - s) * (null + w * (condition - null))
    close(iia.sample(ode, x, sigmas, "euler"), y, rtol=1e-11)
