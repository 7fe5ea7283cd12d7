"""Schedulers and networks of diffusers in the terms of this library: time, grid, solver, denoiser and table."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from support import F64, close, normal
from torch import Tensor, nn

import iia_ode as iia
from iia_ode.denoisers import EDMDenoiser
from iia_ode.errors import GridError, InputError
from iia_ode.ode.clock import told

diffusers = pytest.importorskip("diffusers", reason="needs an extra: pip install 'iia-ode[diffusers]'")

from tiny import unet2d  # noqa: E402  (needs diffusers)

from iia_ode.diffusers import denoiser, grid_of, prediction_of, schedule_of, solver_of, time_of  # noqa: E402
from iia_ode.diffusers.table import scheduler_table  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context and return_scalar:DeprecationWarning"),
]


def make(name: str, **config: Any) -> Any:
    return getattr(diffusers, f"{name}Scheduler")(**config)


def stepped(name: str, n: int = 8, options: dict[str, Any] | None = None, **config: Any) -> Any:
    scheduler = make(name, **config)
    scheduler.set_timesteps(n, **(options or {}))
    return scheduler


FLOW = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
CONTINUOUS = {
    "timestep_type": "continuous",
    "prediction_type": "v_prediction",
    "sigma_min": 0.002,
    "sigma_max": 700.0,
} | {"use_karras_sigmas": True}
COSXL = {"prediction_type": "v_prediction", "sigma_data": 1.0, "sigma_max": 120.0}


# ---- schedulers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config", "schedule", "prediction", "time"),
    [
        ("DDIM", {}, "Discrete", "noise", "index"),
        ("DPMSolverMultistep", dict(prediction_type="v_prediction"), "Discrete", "v", "index"),
        ("UniPCMultistep", FLOW, "FlowMatching", "velocity", "1000 sigma"),
        ("FlowMatchEulerDiscrete", {}, "FlowMatching", "velocity", "1000 sigma"),
        ("EulerDiscrete", CONTINUOUS, "Cosine", "v", "c_noise"),
        ("EDMEuler", {}, "EDM", "data", "c_noise"),
        ("EDMEuler", COSXL, "Cosine", "v", "c_noise"),
        ("MiniMaxH3", {}, "FlowMatching", "velocity", None),
        ("LCM", dict(prediction_type="sample"), "Discrete", "data", "index"),
    ],
    ids=str,
)
def test_a_scheduler_says_what_its_model_is(name, config, schedule, prediction, time):
    scheduler = make(name, **config)
    assert type(schedule_of(scheduler)).__name__ == schedule
    assert prediction_of(scheduler) == prediction
    assert time_of(scheduler) == time


@pytest.mark.parametrize("name", ["EDMEuler", "EDMDPMSolverMultistep"])
def test_outputs_of_the_opposite_sign_are_refused(name):
    with pytest.raises(InputError, match="minus the network"):
        prediction_of(make(name, **COSXL | {"sigma_data": 0.5}))


@pytest.mark.parametrize(
    ("name", "config", "atol"),
    [
        *(("DDIM", {"timestep_spacing": s}, 0.0) for s in ("leading", "trailing")),
        ("DDIM", {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}, 0.0),
        ("TCD", {}, 0.0),
        *(("EulerDiscrete", {"timestep_spacing": s}, 0.05) for s in ("leading", "trailing", "linspace")),
        ("EulerDiscrete", {"use_karras_sigmas": True}, 0.05),
        *(("DPMSolverMultistep", {"timestep_spacing": s}, 1e-9) for s in ("leading", "trailing", "linspace")),
        ("DPMSolverMultistep", {"use_karras_sigmas": True}, 0.6),
        ("DPMSolverMultistep", {"use_exponential_sigmas": True}, 1.0),
        ("DPMSolverMultistep", {"use_beta_sigmas": True}, 1.0),
        ("DPMSolverMultistep", {"use_lu_lambdas": True}, 0.6),
        ("UniPCMultistep", FLOW, 1.0),
        ("FlowMatchEulerDiscrete", {"shift": 3.0}, 1e-3),
        ("FlowMatchEulerDiscrete", {"use_karras_sigmas": True}, 1e-3),
        ("FlowMatchEulerDiscrete", {"use_beta_sigmas": True}, 1e-3),
        ("FlowMatchEulerDiscrete", {"invert_sigmas": True}, 1e-3),
        ("FlowMatchEulerDiscrete", {"num_train_timesteps": 500}, 1e-3),
        ("FlowMatchEulerDiscrete", {"use_dynamic_shifting": True}, 1e-3),
        ("MiniMaxH3", {}, 1e-6),
        ("EulerDiscrete", CONTINUOUS, 1e-5),
        ("EDMEuler", {}, 1e-6),
        ("EDMEuler", COSXL, 1e-5),
        ("IPNDM", {}, 1e-6),
    ],
    ids=str,
)
def test_the_told_time_on_the_grid_is_what_a_pipeline_tells_its_model(name, config, atol):
    scheduler = stepped(name, options={"mu": 0.8} if "use_dynamic_shifting" in config else {}, **config)
    grid, schedule = grid_of(scheduler), schedule_of(scheduler)
    got = [float(told(time_of(scheduler), None, schedule, t)) for t in grid.tolist()[:-1]]
    timesteps = scheduler.timesteps.double().unique_consecutive()[: len(got)]
    close(torch.tensor(got[: len(timesteps)], dtype=F64), timesteps, atol=atol, rtol=0)
    assert grid.dtype == F64


def test_whole_timesteps_are_whole_in_the_grid():
    for name in ("DDIM", "DPMSolverMultistep", "UniPCMultistep", "DEISMultistep"):
        grid = grid_of(make(name, timestep_spacing="trailing"), 8)
        assert grid[:-1].tolist() == [999, 874, 749, 624, 499, 374, 249, 124]


def test_a_grid_of_n_steps_leaves_the_scheduler_as_it_is():
    scheduler = make("DPMSolverMultistep", use_karras_sigmas=True)
    before = copy.deepcopy(scheduler.__dict__)
    grid = grid_of(scheduler, 6)
    assert {
        k: v for k, v in scheduler.__dict__.items() if k not in ("timesteps", "sigmas", "betas")
    }.keys() <= before.keys()
    assert scheduler.num_inference_steps is None
    scheduler.set_timesteps(6)
    assert torch.equal(grid_of(scheduler), grid)
    assert len(grid) == 7


def test_dynamic_shifting_takes_the_number_of_tokens():
    scheduler = make("FlowMatchEulerDiscrete", use_dynamic_shifting=True)
    sigmas = np.linspace(1.0, 1 / 5, 5).tolist()
    mu = 0.5 + (1.15 - 0.5) * (1024 - 256) / (4096 - 256)
    by_tokens, by_mu = grid_of(scheduler, sigmas=sigmas, tokens=1024), grid_of(scheduler, sigmas=sigmas, mu=mu)
    assert torch.equal(by_tokens, by_mu)
    assert len(by_mu) == 6
    with pytest.raises(InputError, match="tokens="):
        grid_of(scheduler, 5)


def test_a_grid_needs_steps_that_the_scheduler_can_make():
    with pytest.raises(InputError, match=r"call scheduler.set_timesteps\(n\), or pass n"):
        grid_of(make("DDIM"))
    with pytest.raises(GridError, match=r"DDIMScheduler.set_timesteps failed: ValueError"):
        grid_of(make("DDIM"), 2000)


def test_a_table_with_zero_terminal_snr_keeps_its_other_levels():
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    ddim, euler = make("DDIM", **config), make("EulerDiscrete", **config)
    table = schedule_of(ddim).alphas_cumprod
    assert 0 < table[-1] < 1e-20
    assert torch.equal(table[:-1], ddim.alphas_cumprod[:-1].double())
    assert schedule_of(euler).alphas_cumprod[-1] == 2**-24
    assert torch.equal(schedule_of(euler).alphas_cumprod[:990], euler.alphas_cumprod[:990].double())


def test_a_subclass_is_the_nearest_known_class():
    class Mine(diffusers.UniPCMultistepScheduler):
        """A scheduler of a user."""

    scheduler = Mine(**FLOW)
    assert solver_of(scheduler, 8) == solver_of(make("UniPCMultistep", **FLOW), 8)
    assert schedule_of(scheduler) == iia.FlowMatching()


# ---- without a counterpart -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config", "text"),
    [
        ("EulerAncestralDiscrete", {}, "EulerAncestralDiscreteScheduler draws noise in its steps"),
        ("LCM", {}, "draws noise"),
        ("DPMSolverMultistep", dict(algorithm_type="sde-dpmsolver++"), "algorithm_type='sde-dpmsolver"),
        ("DPMSolverSinglestep", dict(solver_type="heun"), "solver_type='heun'"),
        ("FlowMatchEulerDiscrete", dict(stochastic_sampling=True), "stochastic_sampling=True"),
        ("LTXEulerAncestralRF", {}, "eta=1.0"),
        ("PNDM", dict(prediction_type="v_prediction"), "prediction_type='v_prediction'"),
        ("UniPCMultistep", dict(disable_corrector=[0]), "corrector in some steps"),
        ("UniPCMultistep", dict(solver_p=make("DDIM")), "solver_p"),
    ],
    ids=str,
)
def test_a_scheduler_without_counterpart_says_why_and_which_ones_have_one(name, config, text):
    with pytest.raises(InputError, match=text) as caught:
        solver_of(make(name, **config), 8)
    assert "DPMSolverMultistepScheduler" in str(caught.value)


def test_a_solver_that_depends_on_the_number_of_steps_asks_for_it():
    with pytest.raises(InputError, match="call set_timesteps, or pass n"):
        solver_of(make("DPMSolverMultistep"))
    assert solver_of(make("DDIM")).label == "ddim"
    assert solver_of(make("DPMSolverMultistep"), 20).label == "dpmpp_2m"
    assert solver_of(make("DPMSolverMultistep"), 8).base.label == "dpmpp_2m"


@pytest.mark.parametrize("function", [schedule_of, prediction_of, time_of, grid_of, solver_of])
def test_another_object_than_a_scheduler_is_an_input_error(function):
    with pytest.raises(InputError, match="expected a scheduler of diffusers, got Linear"):
        function(nn.Linear(2, 2))


def test_a_scheduler_without_a_noise_schedule_is_an_input_error():
    with pytest.raises(InputError, match="ScoreSdeVeScheduler has no noise schedule"):
        schedule_of(make("ScoreSdeVe"))
    with pytest.raises(InputError, match="trigflow"):
        prediction_of(make("SCM"))


def test_the_table_has_every_scheduler_of_the_installed_diffusers():
    table = scheduler_table()
    named = [name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax")]
    missing = [name for name in named if f"`{name}`" not in table]
    assert len(missing) <= 3, missing  # those of packages that are not installed
    assert "| `DDIMScheduler` | `ddim` | `Discrete(alphas_cumprod)` | `'index'` |" in table
    assert "`LCMScheduler` | none: it draws noise in its steps |" in table
    assert len({line.count("|") for line in table.splitlines()}) == 1


# ---- networks --------------------------------------------------------------------------------------------------------


def unet(**options: Any) -> Any:
    """A network with attention and one channel."""
    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    sizes = dict(block_out_channels=(8, 16), attention_head_dim=8, down_block_types=down, up_block_types=up)
    return unet2d(1, **(sizes | options))


@torch.no_grad()
def test_a_unet_is_a_model_and_equals_its_pipeline_loop():
    network, scheduler, x = unet(), stepped("DDIM", 5, clip_sample=False), normal(2, 1, 8, 8).float()
    ode = iia.ProbabilityFlowODE(denoiser(network), schedule_of(scheduler), prediction_of(scheduler))
    y = x
    for t in scheduler.timesteps:
        y = scheduler.step(network(y, t).sample, t, y).prev_sample
    close(iia.sample(ode, x, grid_of(scheduler), solver_of(scheduler)), y, rtol=1e-5, atol=2e-6)
    assert ode.time == "index"


@torch.no_grad()
def test_whole_timesteps_equal_a_scheduler_between_its_timesteps():
    network, x = unet(), normal(2, 1, 8, 8).float()
    scheduler = stepped("DPMSolverMultistep", 6, use_karras_sigmas=True)
    options = {"prediction": prediction_of(scheduler), "time_rounding": "nearest"}
    ode = iia.ProbabilityFlowODE(denoiser(network), schedule_of(scheduler), **options)
    y = x
    for t in scheduler.timesteps:
        y = scheduler.step(network(y, t).sample, t, y).prev_sample
    close(iia.sample(ode, x, grid_of(scheduler), solver_of(scheduler)), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "config", "rounding"),
    [
        ("UniPCMultistep", FLOW, "floor"),  # Wan
        ("FlowMatchEulerDiscrete", {"shift": 3.0}, None),  # Stable Diffusion 3
        ("FlowMatchEulerDiscrete", {"invert_sigmas": True}, None),  # Mochi
        ("EulerDiscrete", CONTINUOUS, None),  # Stable Video Diffusion
        ("EDMEuler", {}, None),  # Playground
        ("EDMDPMSolverMultistep", {}, None),
        ("EDMEuler", COSXL, None),
        ("EDMDPMSolverMultistep", COSXL, None),
    ],
    ids=str,
)
@torch.no_grad()
def test_the_model_of_a_scheduler_equals_the_loop_of_its_pipelines(name, config, rounding):
    network, scheduler = unet(), stepped(name, 6, **config)
    schedule, grid = schedule_of(scheduler), grid_of(scheduler)
    model = denoiser(network, time=time_of(scheduler))
    if isinstance(schedule, iia.EDM):
        model = EDMDenoiser(model, scheduler.config.sigma_data)
    ode = iia.ProbabilityFlowODE(model, schedule, prediction_of(scheduler), time_rounding=rounding)
    x = schedule.sigma(float(grid[0])) * normal(2, 1, 8, 8).float()
    ours = iia.sample(ode, x, grid, solver_of(scheduler))
    y = x / schedule.alpha(float(grid[0])) if isinstance(schedule, iia.Cosine) else x
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(y, t) if hasattr(scheduler, "scale_model_input") else y
        y = scheduler.step(network(scaled, t).sample, t, y).prev_sample
    close(ours, y, rtol=1e-5, atol=5e-6 * float(y.abs().max()))


def test_a_denoiser_keeps_fingerprint_dtype_and_weights():
    network = unet()
    model, schedule = denoiser(network), schedule_of(make("DDIM"))
    bare = iia.ProbabilityFlowODE(network, schedule).fingerprint()
    ode = iia.ProbabilityFlowODE(model, schedule, "noise")
    assert ode.fingerprint() == bare
    assert next(iter(model.parameters())) is next(network.parameters())
    model.to(torch.bfloat16)
    x = normal(2, 1, 8, 8).float()
    assert ode.compute_dtype(x) == torch.bfloat16
    assert ode.output(x, 500).dtype == torch.float32
    assert ode.fingerprint() == bare


def test_networks_with_other_orders_of_arguments_are_called_by_keyword():
    torch.manual_seed(0)
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=10,
        patch_size=2,
    ).eval()
    x, t, labels = normal(2, 4, 8, 8).float(), torch.tensor([5.0, 5.0]), torch.tensor([1, 2])
    want = network(x, timestep=t, class_labels=labels).sample[:, :4]  # the other half is a learned variance
    assert torch.equal(denoiser(network)(x, t, class_labels=labels), want)
    assert torch.equal(denoiser(network)(x, t, class_labels=labels, return_dict=False), want)


def test_wrapped_and_compiled_networks_are_networks():
    network, x, t = unet(), normal(2, 1, 8, 8).float(), torch.tensor([5.0, 5.0])
    want = denoiser(network)(x, t)
    close(denoiser(nn.DataParallel(network))(x, t), want)
    close(denoiser(torch.compile(network, backend="eager"))(x, t), want)


def test_what_is_no_network_of_diffusers_is_an_input_error():
    with pytest.raises(InputError, match="got function"):
        denoiser(lambda x, t: x)
    with pytest.raises(InputError, match="Linear has no argument 'timestep'"):
        denoiser(nn.Linear(2, 2))

    class Odd(nn.Module):
        def forward(self, sample: Tensor, timestep: Tensor) -> dict[str, Tensor]:
            return {"x": sample}

    with pytest.raises(InputError, match="returned dict, which has no sample"):
        denoiser(Odd())(normal(2, 2), torch.ones(2))


# ---- reversed flows --------------------------------------------------------------------------------------------------


def test_a_reversed_flow_is_the_flow_from_noise_at_0_to_data_at_1(tmp_path):
    forward, reverse = iia.FlowMatching(), iia.FlowMatching(reverse=True)
    times = torch.linspace(0, 1, 11, dtype=F64)
    for name in ("alpha", "sigma", "lam", "noise_to_signal"):
        close(getattr(reverse, name)(times), getattr(forward, name)(1 - times), rtol=1e-13, atol=1e-15)
    for name in ("alpha_prime", "sigma_prime"):
        close(getattr(reverse, name)(times), -getattr(forward, name)(1 - times))
    assert (reverse.t_data, reverse.t_noise) == (1.0, 0.0)
    for level in (0.0, 0.3, 7.0):
        close(reverse.noise_to_signal(reverse.t_of_noise_to_signal(level)), level, rtol=1e-13)
    assert reverse.config() == {"type": "FlowMatching", "reverse": True}
    assert forward.config() == {"type": "FlowMatching"}
    with pytest.raises(iia.errors.ScheduleError, match="reverse"):
        iia.FlowMatching(reverse=1)


def test_a_fit_to_a_reversed_flow_loads_without_its_schedule(tmp_path):
    class Velocity(nn.Module):
        """The velocity of rectified flow for data N(1, 1/4), x_0 - eps in reversed time."""

        def __init__(self, sign: float) -> None:
            super().__init__()
            self.sign, self.mean = sign, nn.Parameter(torch.tensor(1.0, dtype=F64))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            sigma = (t if self.sign > 0 else 1 - t)[:, None]
            alpha = 1 - sigma
            gain = (sigma - alpha * 0.25) / (alpha**2 * 0.25 + sigma**2)
            return self.sign * (gain * (x - alpha * self.mean) - self.mean)

    forward = iia.ProbabilityFlowODE(Velocity(1.0), iia.FlowMatching(), "velocity")
    reverse = iia.ProbabilityFlowODE(Velocity(-1.0), iia.FlowMatching(reverse=True), "velocity")
    x = normal(32, 3)
    for make_grid in (iia.grids.karras, iia.grids.log_snr):
        grids = (make_grid(6, 0.01, 50.0, schedule=ode.schedule) for ode in (forward, reverse))
        ours, theirs = (iia.sample(o, x, g, "dpmpp_2m") for o, g in zip((forward, reverse), grids, strict=True))
        close(theirs, ours, rtol=1e-10)
    grid = torch.linspace(0, 1, 7, dtype=F64)
    fit = iia.preset("iia-ddim").fit(reverse, x, grid)
    again = iia.load(fit.save(tmp_path / "fit.safetensors"))
    close(iia.sample(reverse, x, solver=again), iia.sample(reverse, x, solver=fit))
    assert again.plan.schedule == iia.FlowMatching(reverse=True)


@pytest.mark.parametrize("beta", [0.5, 5.0, 20.0])
def test_a_constant_beta_is_a_vp_schedule(beta):
    schedule = iia.VP(beta, beta)
    close(schedule.alpha(0.7), float(np.exp(-beta * 0.35)), rtol=1e-14)
    for t in (1e-3, 0.3, 1.0):
        close(schedule.t_of_lam(schedule.lam(t)), t, rtol=1e-10)
    grid = iia.grids.karras(5, schedule=schedule)
    assert len(grid) == 6
