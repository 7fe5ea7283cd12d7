"""Solvers inside of diffusers' pipelines, and pipelines as ODEs: small random networks, the same numbers on both sides."""

import copy
import json
import logging
import pickle  # noqa: TID251  (a user may pickle a scheduler, the library does not)
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import iia_ode as iia
from iia_ode.errors import FingerprintWarning, MismatchError, MismatchWarning, PredictionWarning
from iia_ode.ode.origin import conditions_digest
from iia_ode.solvers import LowerOrderFinal, UniPC, get_solver
from iia_ode.warm_starts import WarmStart

diffusers = pytest.importorskip("diffusers", reason="needs an extra: pip install 'iia-ode[diffusers]'")
pytest.importorskip("transformers", reason="pipelines of diffusers need transformers")

import tiny  # noqa: E402  (needs diffusers)
from tiny import gap, latents, noise  # noqa: E402

from iia_ode.diffusers import IIAScheduler, ode  # noqa: E402
from iia_ode.diffusers.arguments import arguments  # noqa: E402
from iia_ode.iia.batch import Batch  # noqa: E402
from iia_ode.sharing.in_use import Sampled, at_fit  # noqa: E402

# Random networks predict nothing, and NumPy warns of the tensors that diffusers hands to it.
pytestmark = [
    pytest.mark.filterwarnings("ignore::iia_ode.errors.PredictionWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context and return_scalar:DeprecationWarning"),
]

ROUNDING = 2e-6
"""What float32 inside of diffusers' schedulers may do to latents, relative to their largest value."""

TABLES = 2.5e-7
"""What the float32 tables of levels inside of diffusers' schedulers may do to latents of float64."""

BATCHED = 2e-5
"""What another batch size may do to a guided output."""

DPM = LowerOrderFinal(get_solver("dpmpp_2m"))
UNIPC = LowerOrderFinal(UniPC(max_order=2, variant="bh2"))


def dpm() -> Any:
    return tiny.sd_scheduler("DPMSolverMultistepScheduler")


def karras(kind: str) -> Any:
    """A scheduler with states x / alpha; with this spacing its initial noise is that of the others."""
    return tiny.sd_scheduler(kind, timestep_spacing="leading")


def flow(kind: str = "Euler", **options: Any) -> Any:
    return getattr(diffusers, f"FlowMatch{kind}DiscreteScheduler")(**(options or {"shift": 3.0}))


@dataclass(frozen=True)
class Case:
    """A pipeline, its call, a scheduler of diffusers, and the solver that does the same."""

    name: str
    pipe: Callable[[], Any]
    call: dict[str, Any]
    scheduler: Callable[[], Any]
    solver: Any
    steps: int = 4
    options: dict[str, Any] = field(default_factory=dict)
    whole: bool = False
    is_ode: bool = True
    """Whether the pipeline does nothing but to solve its ODE."""
    rounding: float = ROUNDING
    """What float32 inside of the scheduler may do to latents."""
    tables: float = TABLES
    """What the float32 tables of the scheduler may do to latents of float64."""

    def __str__(self) -> str:
        return self.name

    def full(self) -> dict[str, Any]:
        return {**self.call, **self.options, "num_inference_steps": self.steps}


def generator(seed: int = 11) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def twice(x: Tensor) -> Tensor:
    return torch.cat([x, x])


SD, XL, SD3, FLUX = tiny.sd_call(), tiny.sdxl_call(), tiny.sd3_call(), tiny.flux_call()
PICTURE = {"image": twice(tiny.image())}
MASKED = {"image": twice(tiny.image()), "mask_image": twice(tiny.mask())}
SHIFTED = {"use_dynamic_shifting": True}
COSXL = {"prediction_type": "v_prediction", "sigma_data": 1.0, "sigma_max": 120.0}
CASES = [
    Case("ddim", tiny.ddim, {"batch_size": 2}, lambda: diffusers.DDIMScheduler(clip_sample=False), "ddim"),
    Case("sd", tiny.sd, SD, dpm, DPM),
    Case("sd-ddim", tiny.sd, SD, tiny.sd_scheduler, "ddim"),
    Case("sd-euler", tiny.sd, SD, lambda: karras("EulerDiscreteScheduler"), "ddim"),
    Case("sd-heun", tiny.sd, SD, lambda: karras("HeunDiscreteScheduler"), "deis_rho_heun"),
    Case("sd-img2img", lambda: tiny.sd("StableDiffusionImg2ImgPipeline"), SD, dpm, DPM, 5, PICTURE | {"strength": 0.6}),
    Case("sd-inpaint", lambda: tiny.sd("StableDiffusionInpaintPipeline"), SD, dpm, DPM, 4, MASKED, is_ode=False),
    Case(
        "sd-inpaint-0.7",
        lambda: tiny.sd("StableDiffusionInpaintPipeline"),
        SD,
        dpm,
        DPM,
        5,
        MASKED | {"strength": 0.7},
        is_ode=False,
    ),
    Case("controlnet", tiny.controlnet, SD, dpm, DPM, 4, {"image": twice(tiny.image())}),
    Case(
        "controlnet-end",
        tiny.controlnet,
        SD,
        dpm,
        DPM,
        4,
        {"image": twice(tiny.image()), "control_guidance_end": 0.5},
        is_ode=False,
    ),
    Case("sdxl", tiny.sdxl, XL, dpm, DPM),
    Case("cosxl", tiny.sdxl, XL, lambda: diffusers.EDMEulerScheduler(**COSXL), "ddim", tables=6e-7),
    Case("sd3", tiny.sd3, SD3, flow, "euler"),
    Case("sd3-heun", tiny.sd3, SD3, lambda: flow("Heun", shift=3.0), "heun"),
    Case("sd3-img2img", lambda: tiny.sd3("StableDiffusion3Img2ImgPipeline"), SD3, flow, "euler", 5, PICTURE),
    Case("flux", tiny.flux, FLUX, lambda: flow(**SHIFTED), "euler"),
    Case("flux-img2img", lambda: tiny.flux("FluxImg2ImgPipeline"), FLUX, lambda: flow(**SHIFTED), "euler", 5, PICTURE),
    Case(
        "flux-inpaint",
        lambda: tiny.flux("FluxInpaintPipeline"),
        FLUX,
        lambda: flow(**SHIFTED),
        "euler",
        5,
        MASKED,
        is_ode=False,
    ),
    Case("dit", tiny.dit, {"class_labels": [1, 2]}, lambda: diffusers.DDIMScheduler(clip_sample=False), "ddim"),
    Case("pixart", tiny.pixart, tiny.pixart_call(), diffusers.DPMSolverMultistepScheduler, DPM),
    Case("svd", tiny.svd, tiny.svd_call(), lambda: tiny.svd().scheduler, "ddim", rounding=8e-6, tables=3e-6),
    Case("wan", tiny.wan, tiny.wan_call(), lambda: tiny.wan().scheduler, UNIPC, whole=True),
]


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def pipe(case: Case) -> Any:
    return case.pipe()


def evaluated(pipe: Any, **call: Any) -> tuple[Tensor, Tensor]:
    """The first state that the scheduler steps from, and the final latents."""
    scheduler, first = pipe.scheduler, []
    with tiny.recorded(pipe) as states:
        step = scheduler.step

        def stepping(output: Tensor, t: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            first.append(x.clone())
            return step(output, t, x, *args, **kwargs)

        scheduler.step = stepping
        pipe(**call)
    return first[0], states[-1]


# ---- the same numbers ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """Final latents of one call: by a solver of this library, and by its scheduler of diffusers; in two precisions."""

    ours: Tensor
    theirs: Tensor
    ours_in_double: Tensor
    theirs_in_double: Tensor


@pytest.fixture(scope="module")
def drawn(case: Case, pipe: Any) -> Drawn:
    draw, found = torch.randn, []

    def in_single(*shape: Any, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        return draw(*shape, dtype=torch.float32, **options).to(dtype or torch.float32)

    double = copy.deepcopy(pipe).to(torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn", in_single)  # the noise of a seed depends on the dtype
        for own, dtype in ((pipe, torch.float32), (double, torch.float64)):
            call = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in case.full().items()}
            for scheduler in (
                IIAScheduler.of(case.solver, case.scheduler(), whole_timesteps=case.whole),
                case.scheduler(),
            ):
                found.append(latents(own, scheduler, generator=generator(), **call))
    return Drawn(*found)


def test_a_solver_draws_what_its_scheduler_of_diffusers_draws(case: Case, drawn: Drawn) -> None:
    assert drawn.ours.dtype == drawn.theirs.dtype and gap(drawn.ours, drawn.theirs) < case.rounding


def test_in_double_precision_nothing_but_tables_tells_a_solver_from_its_scheduler(case: Case, drawn: Drawn) -> None:
    dtype = torch.float32 if case.name == "wan" else torch.float64  # the states of Wan are always float32
    assert drawn.ours_in_double.dtype == drawn.theirs_in_double.dtype == dtype
    assert gap(drawn.ours_in_double, drawn.theirs_in_double) < case.tables


def test_rounding_in_single_precision_costs_no_more_than_under_the_scheduler_of_diffusers(drawn: Drawn) -> None:
    ours, theirs = (
        float((single.double() - double.double()).square().mean().sqrt())
        for single, double in ((drawn.ours, drawn.ours_in_double), (drawn.theirs, drawn.theirs_in_double))
    )
    assert ours < 1.25 * theirs


def test_a_pipeline_draws_what_sample_draws_on_its_ode(case: Case, pipe: Any) -> None:
    if not case.is_ode:
        pytest.skip("this pipeline changes states between steps, or its network by the step")
    pipe.scheduler = IIAScheduler.of(case.solver, case.scheduler(), whole_timesteps=case.whole)
    first, final = evaluated(pipe, generator=generator(), **case.full())
    whole = ode(pipe, generator=generator(), **case.call, **case.options)  # svd adds noise to its image
    count = len(first) // 2 if case.name == "dit" else len(first)  # with a copy of the batch for guidance
    plan = pipe.scheduler.plan
    if "img2img" in case.name:
        begin = len(plan.evaluation_times) - int(case.steps * case.options.get("strength", 0.6)) * pipe.scheduler.order
        plan = pipe.scheduler._choice.rest(plan, begin)
    ours = iia.sample(whole, first[:count], solver=plan)
    assert whole.state_shape == tuple(first.shape[1:])
    assert gap(final[:count], ours) == 0.0


def test_every_solver_runs_in_a_pipeline(subtests: Any) -> None:
    pipe = tiny.ddim()
    base, model = pipe.scheduler, ode(pipe)
    x = noise(2, 3, 8, 8, seed=3)
    for name in ("unipc", "heun", "rk4", "fpndm", "ipndm", "dpmpp_3s", "dpm2"):
        with subtests.test(name):
            pipe.scheduler = IIAScheduler.of(name, base)
            found = latents(pipe, batch_size=2, generator=generator(3), num_inference_steps=5)
            assert gap(found, iia.sample(model, x, solver=pipe.scheduler.plan)) == 0.0


# ---- a fit, and what pipelines do with one ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sd() -> Any:
    return tiny.sd()


@pytest.fixture(scope="module")
def model(sd: Any) -> Any:
    sd.scheduler = tiny.sd_scheduler()
    return ode(sd, **tiny.sd_call(4))


@pytest.fixture(scope="module")
def fit(model: Any) -> Any:
    grid = torch.tensor([999.0, 640.0, 260.0, -1.0], dtype=torch.float64)
    return iia.IIA("ddim", history=1, substeps=2, guard=False).fit(model, noise(4, 4, 8, 8, seed=9), grid)


@pytest.fixture(scope="module")
def scheduler(fit: Any) -> IIAScheduler:
    return IIAScheduler.of(fit, tiny.sd_scheduler())


def draw(sd: Any, scheduler: Any, **call: Any) -> Tensor:
    own = SD | {"latents": noise(2, 4, 8, 8), "num_inference_steps": 3, "output_type": "latent"} | call
    return latents(sd, scheduler, **own)


def test_a_fit_of_a_pipeline_draws_in_the_pipeline_what_sample_draws(sd: Any, fit: Any, scheduler: Any) -> None:
    assert gap(draw(sd, scheduler), iia.sample(ode(sd, **SD), noise(2, 4, 8, 8), solver=fit)) == 0.0
    assert len(scheduler.timesteps) == fit.nfe and len(scheduler.sigmas) == fit.nfe + 1


def test_several_fits_are_chosen_by_their_evaluations(sd: Any, model: Any, fit: Any, scheduler: Any) -> None:
    plan = get_solver("dpmpp_2m").plan(model.schedule, iia.grids.karras(5, schedule=model.schedule))
    both = IIAScheduler.of([fit, plan], tiny.sd_scheduler())
    assert torch.equal(draw(sd, both), draw(sd, scheduler))
    ours = iia.sample(ode(sd, **SD), noise(2, 4, 8, 8), solver=plan)
    assert torch.equal(draw(sd, both, num_inference_steps=5), ours)
    with pytest.raises(MismatchError, match="num_inference_steps=3 or num_inference_steps=5"):
        draw(sd, both, num_inference_steps=4)


def test_a_plan_on_noise_levels_moves_to_the_states_of_the_pipeline(sd: Any, model: Any) -> None:
    levels = [model.schedule.noise_to_signal(t) for t in (999.0, 600.0, 300.0, 50.0)]
    grid = torch.tensor([*levels, 0.0], dtype=torch.float64)
    plan = get_solver("heun").plan(iia.EDM(), grid)
    found = draw(sd, IIAScheduler.of(plan, tiny.sd_scheduler()), num_inference_steps=4)
    edm = iia.ProbabilityFlowODE(Renamed(ode(sd, **SD)), iia.EDM(), prediction="noise")
    theirs = iia.sample(edm, noise(2, 4, 8, 8) / model.schedule.alpha(999.0), solver=plan)
    assert gap(found, theirs) < ROUNDING


class Renamed(torch.nn.Module):
    """An ODE of timesteps as a model of noise levels."""

    def __init__(self, ode: Any) -> None:
        super().__init__()
        self.ode = ode

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = self.ode.schedule.t_of_noise_to_signal(float(t[0]))
        return self.ode.output(x * self.ode.schedule.alpha(time), time)


def test_a_run_that_begins_in_the_middle_takes_the_other_solver(fit: Any) -> None:
    pipe = tiny.sd("StableDiffusionImg2ImgPipeline")
    call = SD | PICTURE | {"strength": 0.7, "num_inference_steps": 3}
    pipe.scheduler = IIAScheduler.of(fit, tiny.sd_scheduler())
    with pytest.raises(MismatchError, match="otherwise='dpmpp_2m'"):
        pipe(**call)
    pipe.scheduler = IIAScheduler.of(fit, tiny.sd_scheduler(), otherwise="ddim")
    first, final = evaluated(pipe, generator=generator(), **call)
    assert gap(final, iia.sample(ode(pipe, **SD, **PICTURE), first, grid=fit.grid[1:], solver="ddim")) == 0.0
    with pytest.raises(iia.errors.InputError, match="Raise strength"):
        pipe(**call | {"strength": 0.2})
    whole = call | {"strength": 1.0}
    first, final = evaluated(pipe, generator=generator(), **whole)
    assert gap(final, iia.sample(ode(pipe, **SD, **PICTURE), first, solver=fit.plan)) == 0.0


def test_a_refiner_goes_on_where_the_base_stopped() -> None:
    base, refiner = tiny.sdxl(), tiny.sdxl("StableDiffusionXLImg2ImgPipeline")
    found = []
    for scheduler in (dpm(), IIAScheduler.of(DPM, dpm())):
        base.scheduler, refiner.scheduler = scheduler, copy.deepcopy(scheduler)
        call = XL | {"num_inference_steps": 8, "output_type": "latent"}
        half = base(**call, denoising_end=0.5, generator=generator()).images
        call = {k: v for k, v in call.items() if k not in ("height", "width")}
        found.append(latents(refiner, image=half, denoising_start=0.5, generator=generator(), **call))
    assert gap(found[1], found[0]) < ROUNDING


def test_inpainting_keeps_the_known_part_under_a_fit(fit: Any) -> None:
    pipe = tiny.sd("StableDiffusionInpaintPipeline")
    pipe.scheduler = IIAScheduler.of(fit, tiny.sd_scheduler())
    found = pipe(**SD, **MASKED, num_inference_steps=3, generator=generator(), output_type="latent").images
    pipe.scheduler = tiny.sd_scheduler()
    theirs = pipe(**SD, **MASKED, num_inference_steps=3, generator=generator(), output_type="latent").images
    known = (..., slice(4, None))
    assert torch.equal(found[known], theirs[known]) and not torch.equal(found, theirs)


@pytest.mark.parametrize("in_place", [False, True], ids=["a new state", "in place"])
def test_a_callback_that_changes_the_state_changes_the_run(sd: Any, fit: Any, scheduler: Any, in_place: bool) -> None:
    def callback(pipe: Any, i: int, t: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        if i == 0:
            changed = values["latents"].mul_(0.5) if in_place else 0.5 * values["latents"]
            return {"latents": changed}
        return {}

    found = draw(sd, scheduler, callback_on_step_end=callback)
    whole = ode(sd, **SD)
    run = fit.plan.start(noise(2, 4, 8, 8), "noise")
    run.give(whole.output(run.state, run.t))
    run.edit(0.5 * run.state)
    assert torch.equal(found, iia.sample(whole, run))


def test_inference_mode_changes_nothing(sd: Any, scheduler: Any) -> None:
    with torch.inference_mode():
        found = draw(sd, scheduler)
    assert torch.equal(found, draw(sd, scheduler))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_costs_no_more_than_under_a_scheduler_of_diffusers(scheduler: Any, dtype: torch.dtype) -> None:
    full, half = tiny.sd(), tiny.sd().to(dtype)
    call = SD | {"num_inference_steps": 3}
    low = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in call.items()}
    x = noise(2, 4, 8, 8).to(dtype)
    errors = []
    for own in (scheduler, dpm()):
        found = latents(half, own, latents=x, **low)
        assert found.dtype == dtype
        errors.append(gap(found.float(), latents(full, own, latents=x.float(), **call)))
    assert errors[0] < 1.5 * errors[1]


def test_timesteps_in_half_precision_are_those_of_their_evaluations() -> None:
    grid = torch.tensor([1.0, 0.9985, 0.6, 0.5995, 0.1, 0.0], dtype=torch.float64)  # 1000 and 998.5 are one in bfloat16
    scheduler = IIAScheduler.of(get_solver("euler").plan(iia.FlowMatching(), grid), flow())
    finals = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        scheduler.set_timesteps(5)
        x = noise(1, 4, 8, 8)
        for t in scheduler.timesteps:
            x = scheduler.step(0.9 * x, t.to(dtype), x).prev_sample
        finals.append(x)
    assert torch.equal(finals[0], finals[1]) and torch.equal(finals[0], finals[2])
    scheduler.set_timesteps(5)
    x = scheduler.step(x, scheduler.timesteps[0].bfloat16(), x).prev_sample
    with pytest.raises(iia.errors.InputError, match="out of order"):
        scheduler.step(x, scheduler.timesteps[2].bfloat16(), x)


def test_a_flow_pipeline_in_half_precision_tells_its_network_rounded_times() -> None:
    full, half = tiny.sd3(), tiny.sd3().to(torch.bfloat16)
    own = IIAScheduler.of("euler", flow())
    call = SD3 | {"num_inference_steps": 4}
    low = {k: v.bfloat16() if isinstance(v, Tensor) else v for k, v in call.items()}
    x = noise(2, 4, 8, 8).bfloat16()
    errors = []
    for scheduler in (own, flow()):
        found = latents(half, scheduler, latents=x, **low)
        assert found.dtype == torch.bfloat16
        errors.append(gap(found.float(), latents(full, scheduler, latents=x.float(), **call)))
    assert errors[0] < 1.5 * errors[1]


@pytest.mark.parametrize("name", ["dpmpp_2m", "heun", "unipc"])
def test_nothing_is_read_from_the_device_of_a_pipeline(name: str) -> None:
    scheduler = IIAScheduler.of(name, tiny.sd_scheduler())
    scheduler.set_timesteps(4, device="meta")  # a read from this device is an error
    for dtype in (torch.float32, torch.float16):
        scheduler.set_timesteps(4, device="meta")
        x = torch.empty(2, 4, 8, 8, device="meta", dtype=dtype)
        x = scheduler.add_noise(x, x, scheduler.timesteps[:1])
        for t in scheduler.timesteps:
            x = scheduler.step(torch.empty_like(x), t, x.clone(), return_dict=False)[0]
        assert x.dtype == dtype and scheduler.sigmas.device.type == "cpu"


def test_copies_in_the_middle_of_a_run_go_on_alone(sd: Any, scheduler: Any) -> None:
    final = draw(sd, scheduler)
    steps, copies = [], []

    def callback(pipe: Any, i: int, t: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        if i == 0:
            own = copy.copy(scheduler)
            del own.step  # the recording
            copies.extend([copy.deepcopy(own), pickle.loads(pickle.dumps(own))])
        return {}

    def hook(module: Any, args: Any, output: Any) -> None:
        null, own = output[0].chunk(2)
        steps.append(null + SD["guidance_scale"] * (own - null))

    with sd.unet.register_forward_hook(hook):
        draw(sd, scheduler, callback_on_step_end=callback)
    for twin in copies:
        x = twin._run.run.state
        for output, t in zip(steps[1:], twin.timesteps[1:], strict=True):
            x = twin.step(output, t, x, return_dict=False)[0]
        assert torch.equal(x, final)
    assert copies[0].plan is scheduler.plan


def test_an_interrupted_pipeline_runs_again_as_if_for_the_first_time(sd: Any, scheduler: Any) -> None:
    class StopError(Exception):
        pass

    def callback(pipe: Any, i: int, t: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        raise StopError

    first = draw(sd, scheduler)
    with pytest.raises(StopError):
        draw(sd, scheduler, callback_on_step_end=callback)
    assert torch.equal(draw(sd, scheduler), first)


def test_a_warm_start_is_served_where_the_pipeline_scales_its_inputs(sd: Any, model: Any, fit: Any) -> None:
    start = model.schedule.t_noise
    warm = WarmStart.gaussian(
        model.schedule, start, 800.0, mean=torch.zeros(4, 8, 8).double(), covariance=torch.ones(4, 8, 8).double() / 2
    )
    plan = warm.then(get_solver("ddim").plan(model.schedule, torch.tensor([800.0, 500.0, 200.0, -1.0]).double()))
    found = draw(sd, IIAScheduler.of(plan, tiny.sd_scheduler()))
    assert gap(found, iia.sample(ode(sd, **SD), noise(2, 4, 8, 8), solver=plan)) < ROUNDING
    pipe = tiny.sd3()
    flat = torch.full((4, 8, 8), 0.5, dtype=torch.float64)
    warm = WarmStart.gaussian(iia.FlowMatching(), 1.0, 0.8, mean=0 * flat, covariance=flat)
    plan = warm.then(get_solver("euler").plan(iia.FlowMatching(), torch.tensor([0.8, 0.4, 0.0], dtype=torch.float64)))
    pipe.scheduler = IIAScheduler.of(plan, flow())
    with pytest.raises(MismatchError, match=r"warm start.*does not call scale_model_input"):
        pipe(**SD3, num_inference_steps=2)


# ---- files -----------------------------------------------------------------------------------------------------------

FRESH = """
import sys, torch, diffusers, iia_ode.diffusers
from safetensors.torch import load_file, save_file
pipe = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1])
call = load_file(sys.argv[2])
images = pipe(**call, num_inference_steps=3, output_type="pt").images
save_file({"images": images.contiguous()}, sys.argv[3])
"""


@pytest.fixture(scope="module")
def saved(scheduler: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipe = tiny.sd(**tiny.texts())
    pipe.scheduler = scheduler
    folder = tmp_path_factory.mktemp("pipelines") / "my-model"
    pipe.save_pretrained(folder)
    return folder


def test_a_saved_pipeline_gives_bit_equal_images_in_a_fresh_process(sd: Any, scheduler: Any, saved: Path) -> None:
    from safetensors.torch import load_file, save_file

    sd.scheduler = scheduler
    call = {k: v for k, v in SD.items() if isinstance(v, Tensor)} | {"latents": noise(2, 4, 8, 8)}
    images = sd(**call, num_inference_steps=3, output_type="pt").images
    save_file(call, saved.parent / "call.safetensors")
    paths = [str(saved.parent / name) for name in ("my-model", "call.safetensors", "images.safetensors")]
    done = subprocess.run([sys.executable, "-c", FRESH, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(load_file(paths[2])["images"], images)


def test_a_download_brings_every_file_of_a_saved_pipeline(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from diffusers.pipelines import pipeline_utils
    from huggingface_hub.utils import filter_repo_objects

    files = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    brought: set[str] = set()

    def snapshot(*args: Any, allow_patterns: list[str], ignore_patterns: list[str], **kwargs: Any) -> str:
        brought.update(filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        return str(saved)

    elsewhere = saved.parent / "cache"
    elsewhere.mkdir(exist_ok=True)
    (elsewhere / "model_index.json").write_text((saved / "model_index.json").read_text())
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files], sha="0" * 40)
    monkeypatch.setattr(pipeline_utils, "model_info", lambda *args, **kwargs: info)
    monkeypatch.setattr(pipeline_utils, "_resolve_revision", lambda *args, **kwargs: "0" * 40)
    monkeypatch.setattr(pipeline_utils, "hf_hub_download", lambda *args, **kwargs: str(elsewhere / "model_index.json"))
    monkeypatch.setattr(pipeline_utils, "snapshot_download", snapshot)
    diffusers.DiffusionPipeline.download("somebody/my-model")
    assert brought == files and "scheduler/solver.iia" in files
    assert not [name for name in files if name.startswith("scheduler/") and name.endswith((".safetensors", ".bin"))]


def test_a_scheduler_comes_back_from_its_folder(scheduler: Any, fit: Any, sd: Any, tmp_path: Path) -> None:
    scheduler.save_pretrained(tmp_path)
    assert "weights" not in (tmp_path / "scheduler_config.json").read_text()
    found = IIAScheduler.from_pretrained(tmp_path)
    assert found.plan == scheduler.plan and torch.equal(draw(sd, found), draw(sd, scheduler))
    assert str(iia.load(tmp_path / "solver.iia")) == str(fit)


@pytest.mark.parametrize("name", ["dpmpp_2m", "heun", "unipc"])
def test_a_classic_solver_comes_back_from_its_configuration(sd: Any, name: str, tmp_path: Path) -> None:
    own = IIAScheduler.of(name, tiny.sd_scheduler(), otherwise="ddim", whole_timesteps=True)
    own.save_pretrained(tmp_path)
    for found in (IIAScheduler.from_pretrained(tmp_path), IIAScheduler.from_config(own.config)):
        assert found.config["_iia_ode"] == own.config["_iia_ode"] and torch.equal(draw(sd, found), draw(sd, own))


def test_entries_of_a_configuration_can_be_changed(tmp_path: Path) -> None:
    own = IIAScheduler.of("ddim", tiny.sd_scheduler())
    own.save_pretrained(tmp_path)
    trailing = IIAScheduler.of("ddim", tiny.sd_scheduler(timestep_spacing="trailing"))
    change = {"timestep_spacing": "trailing"}
    for found in (IIAScheduler.from_config(own.config, **change), IIAScheduler.from_pretrained(tmp_path, **change)):
        assert torch.equal(found.timesteps, trailing.timesteps) and not torch.equal(found.timesteps, own.timesteps)
    with pytest.raises(iia.errors.InputError, match="has no 'spacing'"):
        IIAScheduler.from_config(own.config, spacing="trailing")


def test_other_schedulers_are_made_from_the_configuration_as_before(
    scheduler: Any, saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    loaded = IIAScheduler.from_pretrained(saved, subfolder="scheduler")
    repr(loaded)
    for own in (scheduler, loaded):
        for kind in (diffusers.EulerDiscreteScheduler, diffusers.UniPCMultistepScheduler):
            found, theirs = kind.from_config(own.config), kind.from_config(tiny.sd_scheduler().config)
            assert torch.equal(found.alphas_cumprod, theirs.alphas_cumprod)
            assert found.config.steps_offset == theirs.config.steps_offset
    logger.removeHandler(caplog.handler)
    assert not caplog.records


@pytest.mark.parametrize("several", [False, True], ids=["one fit", "two fits"])
def test_an_upload_holds_every_solver(
    fit: Any, model: Any, several: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import shutil
    from types import SimpleNamespace

    from diffusers.utils import hub_utils

    uploaded: list[str] = []

    def upload(*, folder_path: Any, **kwargs: Any) -> None:
        uploaded.extend(sorted(path.name for path in Path(folder_path).iterdir()))
        shutil.copytree(folder_path, tmp_path / "hub")

    monkeypatch.setattr(hub_utils, "create_repo", lambda *args, **kwargs: SimpleNamespace(repo_id="somebody/solver"))
    monkeypatch.setattr(hub_utils, "upload_folder", upload)
    monkeypatch.setattr(hub_utils, "load_or_create_model_card", lambda *args, **kwargs: None)
    monkeypatch.setattr(
        hub_utils, "populate_model_card", lambda *args, **kwargs: SimpleNamespace(save=lambda path: None)
    )
    plan = get_solver("dpmpp_2m").plan(model.schedule, iia.grids.karras(5, schedule=model.schedule))
    IIAScheduler.of([fit, plan] if several else fit, tiny.sd_scheduler()).push_to_hub("somebody/solver")
    names = {"solver-3.iia", "solver-5.iia"} if several else {"solver.iia"}
    assert {"scheduler_config.json", *names} <= set(uploaded)
    found = IIAScheduler.from_pretrained(tmp_path / "hub")
    for steps, own in ((3, fit.plan), (5, plan))[: 1 + several]:
        found.set_timesteps(steps)
        assert found.plan == own


def test_a_damaged_configuration_is_refused(scheduler: Any, tmp_path: Path) -> None:
    scheduler.save_pretrained(tmp_path)
    path = tmp_path / "scheduler_config.json"
    good = json.loads(path.read_text())
    for change, message in (
        ({"format": 2}, "format version 2"),
        ({"scheduler": "NoScheduler"}, "has no NoScheduler"),
        ({"files": ["../solver.iia"]}, "elsewhere"),
        ({"files": None}, "damaged"),
        ({"files": ["other.iia"]}, "no file"),
    ):
        path.write_text(json.dumps(good | {"_iia_ode": good["_iia_ode"] | change}))
        with pytest.raises(iia.IIAError, match=message):
            IIAScheduler.from_pretrained(tmp_path)
    with pytest.raises(iia.IIAError, match="from_pretrained"):
        IIAScheduler.from_config(scheduler.config)
    with pytest.raises(iia.IIAError, match=r"IIAScheduler\.of\(solver, pipe\.scheduler\)"):
        IIAScheduler.from_config(tiny.sd_scheduler().config)


# ---- bad use ---------------------------------------------------------------------------------------------------------


def test_a_fit_for_another_configuration_is_refused(fit: Any) -> None:
    linear = diffusers.DDIMScheduler(clip_sample=False)
    with pytest.raises(MismatchError, match="was made for the schedule Discrete"):
        IIAScheduler.of(fit, linear)
    with pytest.raises(MismatchError, match="was made for the schedule Discrete"):
        IIAScheduler.of(fit, flow())
    with pytest.raises(MismatchError, match=r"of noise prediction.*says v"):
        IIAScheduler.of(fit, tiny.sd_scheduler(prediction_type="v_prediction"))


def test_a_wrong_number_of_steps_is_refused_with_the_call_to_make(sd: Any, model: Any, scheduler: Any) -> None:
    with pytest.raises(MismatchError, match="call the pipeline with num_inference_steps=3"):
        draw(sd, scheduler, num_inference_steps=50)
    plan = get_solver("heun").plan(model.schedule, iia.grids.karras(4, schedule=model.schedule))
    with pytest.raises(MismatchError, match=r"num_inference_steps=4 \(4 steps of 2 evaluations\)"):
        draw(sd, IIAScheduler.of(plan, tiny.sd_scheduler()), num_inference_steps=7)


def test_a_grid_of_the_user_is_refused_unless_it_is_that_of_the_fit(sd: Any, scheduler: Any) -> None:
    own = draw(sd, scheduler)
    for name in ("timesteps", "sigmas"):
        scheduler.set_timesteps(3)
        levels = getattr(scheduler, name)[:3].tolist()
        call = {name: levels, "num_inference_steps": 3}
        assert torch.equal(draw(sd, scheduler, **call), own)
        other = [*levels[:1], 0.9 * levels[1], levels[2]]
        with pytest.raises(MismatchError, match=rf"has the {name} .*asks for .*: omit {name}"):
            draw(sd, scheduler, **(call | {name: other}))


def test_a_flow_pipeline_may_pass_its_default_sigmas_and_no_others() -> None:
    plan = get_solver("euler").plan(iia.FlowMatching(), torch.tensor([1.0, 0.8, 0.5, 0.3, 0.0], dtype=torch.float64))
    pipe = tiny.flux()
    scheduler = IIAScheduler.of(plan, pipe.scheduler)
    found = latents(pipe, scheduler, **FLUX, num_inference_steps=4, generator=generator())  # with sigmas of its own
    own = scheduler.sigmas[:4].tolist()
    assert torch.equal(latents(pipe, scheduler, **FLUX, sigmas=own, generator=generator()), found)
    with pytest.raises(
        MismatchError, match=r"has the sigmas 1, 0\.8, 0\.5, 0\.3, 0, and the pipeline asks for 1, 0\.9"
    ):
        pipe(**FLUX, sigmas=[1.0, 0.9, 0.2, 0.1])
    steps = torch.arange(4).double() / 4
    cut = torch.linspace(1000, 1, 4).int().double()
    scheduler.set_timesteps(timesteps=cut, sigmas=cut / 1000, mu=0.0)  # cut to whole numbers
    scheduler.set_timesteps(sigmas=[1.0, *torch.sigmoid(6 - 10 * steps[1:]).tolist()])  # as Stable Audio 3
    with pytest.raises(MismatchError, match="has the timesteps"):
        scheduler.set_timesteps(timesteps=[1000.0, 900.0, 200.0, 100.0])


def test_a_fit_of_another_network_is_a_warning_where_the_pipeline_is_known(fit: Any, sd: Any) -> None:
    sd.scheduler = tiny.sd_scheduler()
    for pipe in (sd, tiny.sd("StableDiffusionImg2ImgPipeline"), tiny.sd().to(torch.bfloat16)):
        assert IIAScheduler.of(fit, pipe).plan == fit.plan
    alone = iia.ProbabilityFlowODE(iia.diffusers.denoiser(sd.unet), fit.plan.schedule, "noise")
    origin = replace(fit.record.origin, fingerprint=alone.fingerprint())
    of_unet = replace(fit, record=replace(fit.record, origin=origin))
    assert IIAScheduler.of(of_unet, sd).plan == fit.plan
    other = tiny.sd()
    with torch.no_grad():
        next(other.unet.parameters()).add_(0.1)
    for own in (fit, of_unet, [fit]):
        with pytest.warns(
            FingerprintWarning, match="was fitted to a network with fingerprint .*StableDiffusionPipeline has"
        ):
            IIAScheduler.of(own, other)
    assert IIAScheduler.of(fit, other.scheduler).plan == fit.plan  # a scheduler has no networks
    assert IIAScheduler.of("ddim", other).plan.name == "ddim"


def test_noise_in_the_steps_is_refused(sd: Any, scheduler: Any) -> None:
    with pytest.raises(iia.errors.InputError, match=r"deterministic, and eta = 0\.5"):
        sd.scheduler = scheduler
        sd(**SD, num_inference_steps=3, eta=0.5)


def test_arguments_of_schedulers_of_one_kind_are_refused(scheduler: Any) -> None:
    scheduler, x = copy.deepcopy(scheduler), noise(1, 4, 8, 8)
    scheduler.set_timesteps(3)
    with pytest.raises(iia.errors.InputError, match="passes per_token_timesteps to its scheduler"):
        scheduler.step(x, scheduler.timesteps[0], x, per_token_timesteps=x)


def test_a_step_out_of_order_is_refused(scheduler: Any) -> None:
    scheduler, x = copy.deepcopy(scheduler), noise(1, 4, 8, 8)
    scheduler.set_timesteps(3)
    first, second, third = scheduler.timesteps
    x = scheduler.step(x, first, x).prev_sample
    with pytest.raises(iia.errors.InputError, match=r"out of order.*expects timestep 640"):
        scheduler.step(x, third, x)
    with pytest.raises(iia.errors.InputError, match="out of order"):
        scheduler.step(x, 999, x)
    for t in (second, third):
        x = scheduler.step(x, t, x).prev_sample
    with pytest.raises(iia.errors.InputError, match="has made its 3 evaluations"):
        scheduler.step(x, third, x)


def test_a_plan_from_noised_images_is_not_for_pure_noise(sd: Any, model: Any) -> None:
    plan = get_solver("ddim").plan(model.schedule, torch.tensor([400.0, 200.0, -1.0], dtype=torch.float64))
    with pytest.warns(MismatchWarning, match=r"begins at level sigma/alpha = .*noised no image"):
        draw(sd, IIAScheduler.of(plan, tiny.sd_scheduler()), num_inference_steps=2)
    pipe = tiny.sd("StableDiffusionImg2ImgPipeline")
    pipe.scheduler = IIAScheduler.of(plan, tiny.sd_scheduler())
    first, final = evaluated(pipe, generator=generator(), **SD, **PICTURE, strength=1.0, num_inference_steps=2)
    assert gap(final, iia.sample(ode(pipe, **SD, **PICTURE), first, solver=plan)) == 0.0


def test_a_pipeline_may_slice_the_timesteps_without_a_begin_index() -> None:
    finals = []
    for begins in (False, True):
        scheduler, x = IIAScheduler.of("dpmpp_2m", tiny.sd_scheduler()), noise(1, 4, 8, 8)
        scheduler.set_timesteps(5)
        if begins:
            scheduler.set_begin_index(2)
        for t in scheduler.timesteps[2:]:
            x = scheduler.step(0.9 * x, t, x, return_dict=False)[0]
        finals.append(x)
    assert torch.equal(*finals)


def test_a_begin_inside_a_step_is_refused(model: Any) -> None:
    pipe = tiny.sd("StableDiffusionImg2ImgPipeline")
    plan = get_solver("fpndm").plan(model.schedule, iia.grids.karras(6, schedule=model.schedule))
    pipe.scheduler = IIAScheduler.of(plan, tiny.sd_scheduler(), otherwise="ddim")
    with pytest.raises(MismatchError, match="lies inside a step"):
        pipe(**SD, **PICTURE, strength=0.9, num_inference_steps=plan.nfe)


def test_weights_for_another_resolution_are_refused(sd: Any, model: Any) -> None:
    base = get_solver("ddim").plan(model.schedule, torch.tensor([999.0, 500.0, -1.0], dtype=torch.float64))
    gains = torch.ones(4, 8, 8, dtype=torch.float64)
    code = tuple(
        iia.plan.Combine(tuple((j, w * gains) for j, w in i.terms), step=i.step)
        if isinstance(i, iia.plan.Combine)
        else i
        for i in base.code
    )
    bound = IIAScheduler.of(iia.Plan(model.schedule, base.grid, code), tiny.sd_scheduler())
    assert draw(sd, bound, num_inference_steps=2).shape == (2, 4, 8, 8)
    with pytest.raises(MismatchError, match="runs at the resolution of the fit alone"):
        draw(sd, bound, num_inference_steps=2, height=24, width=24, latents=noise(2, 4, 12, 12))


def test_tensors_that_do_not_fit_are_refused(scheduler: Any, model: Any) -> None:
    scheduler, x = copy.deepcopy(scheduler), noise(1, 4, 8, 8)
    scheduler.set_timesteps(3)
    with pytest.raises(iia.errors.InputError, match="state's shape"):
        scheduler.step(noise(1, 3, 8, 8), scheduler.timesteps[0], x)
    with pytest.raises(iia.errors.InputError, match="must have shape"):
        iia.sample(model, noise(4, 3, 8, 8), solver="ddim", grid=torch.tensor([999.0, 1.0]))


def test_constants_per_condition_are_refused(model: Any) -> None:
    constant = iia.plan.PerCondition("label", (0, 1), torch.zeros(2, 4, 8, 8, dtype=torch.float64))
    base = get_solver("ddim").plan(model.schedule, torch.tensor([999.0, 500.0, -1.0], dtype=torch.float64))
    last = base.code[-1]
    plan = iia.Plan(model.schedule, base.grid, (*base.code[:-1], iia.plan.Combine(last.terms, constant, last.step)))
    with pytest.raises(MismatchError, match="a pipeline does not tell its scheduler the conditions"):
        IIAScheduler.of(plan, tiny.sd_scheduler())


def test_a_pipeline_may_pass_both_sigmas_and_timesteps_that_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.pipelines.flux import pipeline_flux

    both = {"sigmas": [1.0, 0.7, 0.2], "timesteps": [1000.0, 700.0, 200.0]}
    base, scheduler = flow(shift=1.0), IIAScheduler.of("euler", flow(shift=1.0))
    base.set_timesteps(**both)
    scheduler.set_timesteps(**both)
    assert torch.allclose(scheduler.sigmas, base.sigmas) and torch.allclose(scheduler.timesteps, base.timesteps)
    with pytest.raises(
        MismatchError, match=r"tells its network the timesteps 1000, 700, 200, .*timesteps 1000, 875, 428\.6"
    ):
        IIAScheduler.of("euler", flow()).set_timesteps(**both)  # shifted sigmas

    def both_passed(scheduler: Any, n: int, device: Any, sigmas: Any = None, mu: Any = None) -> Any:
        scheduler.set_timesteps(sigmas=sigmas, timesteps=[1000 * s for s in sigmas], mu=mu)  # as CogView4 does
        return scheduler.timesteps, len(scheduler.timesteps)

    monkeypatch.setattr(pipeline_flux, "retrieve_timesteps", both_passed)
    with pytest.raises(MismatchError, match="tells its network the timesteps 1000, 875"):
        ode(tiny.flux(), **FLUX)
    with pytest.raises(iia.errors.GridError, match=r"DPMSolverMultistepScheduler\.set_timesteps failed"):
        IIAScheduler.of("dpmpp_2m", dpm()).set_timesteps(sigmas=[14.0, 2.0], timesteps=[999, 500])


def test_a_wrong_prediction_type_shows_on_noise(sd: Any) -> None:
    class Skip(torch.nn.Module):
        """A network that knows the noise of pure noise, as trained ones do."""

        def forward(self, x: Tensor, t: Tensor, **kwargs: Any) -> Any:
            from diffusers.models.unets.unet_2d import UNet2DOutput

            return UNet2DOutput(sample=0.95 * x)

    pipe = tiny.ddim()
    pipe.unet.forward = Skip().forward
    with warnings_as_errors():
        ode(pipe)
        pipe.scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction")
        with pytest.raises(PredictionWarning, match=r"says v prediction.*0\.95 times.*'epsilon'"):
            ode(pipe)


def warnings_as_errors() -> Any:
    import contextlib
    import warnings

    @contextlib.contextmanager
    def block() -> Iterator[None]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield

    return block()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dpmpp_9m", tiny.sd_scheduler()), "unknown solver"),
        ((3, tiny.sd_scheduler()), "takes a FittedSolver"),
        (([], tiny.sd_scheduler()), "got nothing"),
        (("fit.safetensors", tiny.sd_scheduler()), r"iia_ode\.load\('fit.safetensors'\)"),
        ((Path("fit"), tiny.sd_scheduler()), r"iia_ode\.load reads a file"),
        (("ddim", "DDIMScheduler"), "the scheduler to be replaced"),
        (("ddim", diffusers.EDMEulerScheduler()), "rules of its own"),
    ],
    ids=["name", "number", "empty", "file", "path", "scheduler", "edm"],
)
def test_a_scheduler_of_something_else_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(iia.IIAError, match=message):
        IIAScheduler.of(*arguments)


def test_channels_of_a_learned_variance_are_left_out() -> None:
    base = tiny.sd_scheduler("DDPMScheduler", variance_type="learned_range")
    scheduler, x = IIAScheduler.of("ddim", base), noise(1, 4, 8, 8)
    plain = IIAScheduler.of("ddim", tiny.sd_scheduler("DDPMScheduler"))
    found = [
        s.step(output, s.timesteps[0], x).prev_sample
        for s, output in ((scheduler, torch.cat([0.9 * x, x], dim=1)), (plain, 0.9 * x))
    ]
    assert torch.equal(*found)


# ---- calls as ODEs ---------------------------------------------------------------------------------------------------

WORDS = {"prompt": ["a red cat", "a blue dog", "green ship"], "negative_prompt": ["ship", "a", "cat"]}


@pytest.fixture(scope="module")
def worded() -> Any:
    return tiny.sd(**tiny.texts())


def test_prompts_go_with_their_samples(worded: Any) -> None:
    whole = ode(worded, **WORDS, guidance_scale=5.0)
    x = noise(6, 4, 8, 8)
    found = whole.output(x, 700.0)
    for k in range(6):
        one = {name: [values[k % 3]] for name, values in WORDS.items()}
        alone = ode(worded, **one, guidance_scale=5.0).output(x[k : k + 1], 700.0)
        assert gap(found[k : k + 1], alone) < BATCHED
        assert gap(whole.subset(slice(k, k + 1), 6).output(x[k : k + 1], 700.0), alone) < BATCHED
    picked = whole.subset(torch.tensor([4, 0]), 6)
    assert picked.conditioning["prompt"] == ["a blue dog", "a red cat"]
    assert picked.subset(slice(1, 2), 2).conditioning["negative_prompt"] == ["ship"]
    with pytest.raises(iia.errors.InputError, match="has 3 prompts, and the batch has 2 samples"):
        whole.output(x[:2], 700.0)


def test_images_per_prompt_stand_side_by_side(worded: Any) -> None:
    whole = ode(worded, **WORDS, num_images_per_prompt=2)
    assert whole.subset(slice(1, 4), 6).conditioning["prompt"] == ["a red cat", "a blue dog", "a blue dog"]
    x = noise(6, 4, 8, 8)
    worded.scheduler = IIAScheduler.of("ddim", tiny.sd_scheduler())
    found = latents(worded, **WORDS, num_images_per_prompt=2, latents=x, num_inference_steps=2)
    assert gap(found, iia.sample(whole, x, solver=worded.scheduler.plan)) == 0.0
    with pytest.raises(iia.errors.InputError, match="3 prompts with 2 images each"):
        whole.output(x[:4], 700.0)


def test_one_prompt_serves_all_samples(worded: Any) -> None:
    x = noise(3, 4, 8, 8)
    found = ode(worded, prompt="a red cat").output(x, 300.0)
    assert gap(found, ode(worded, prompt=["a red cat"] * 3).output(x, 300.0)) < BATCHED


def test_prompts_are_encoded_once(worded: Any) -> None:
    calls: list[int] = []
    with worded.text_encoder.register_forward_hook(lambda *args: calls.append(1)):
        whole = ode(worded, prompt="a red cat", guidance_scale=1.0)
        for t in (900.0, 500.0, 100.0):
            whole.output(noise(2, 4, 8, 8), t)
    assert len(calls) == 2  # for one sample, and for two


def counted(calls: list[str], name: str, function: Any) -> Any:
    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return function(*args, **kwargs)

    return counting


@pytest.mark.parametrize("kind", ["img2img", "inpaint", "controlnet"])
def test_images_are_encoded_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pillow = pytest.importorskip("PIL.Image", reason="images in the form that users have")
    pictures = [pillow.fromarray((255 * numpy_image(seed)).astype("uint8")) for seed in (1, 2)]
    masks = {"mask_image": [pillow.fromarray((255 * tiny.mask()[0, 0].numpy()).astype("uint8"))] * 2}
    kinds = {"img2img": "StableDiffusionImg2ImgPipeline", "inpaint": "StableDiffusionInpaintPipeline"}
    pipe = tiny.controlnet() if kind == "controlnet" else tiny.sd(kinds[kind])
    calls: list[str] = []
    part, name = (pipe.control_image_processor, "preprocess") if kind == "controlnet" else (pipe.vae, "encode")
    monkeypatch.setitem(vars(part), name, counted(calls, name, getattr(part, name)))
    call = SD | {"image": pictures} | (masks if kind == "inpaint" else {})
    whole, x = ode(pipe, **call), noise(2, 4, 8, 8)
    first, made = whole.output(x, 900.0), len(calls)
    for t in (700.0, 300.0, 900.0):
        found = whole.output(x, t)
    assert len(calls) == made and torch.equal(found, first)
    assert vars(part)[name].__qualname__.startswith("counted")  # the pipeline has its own again
    whole.subset(torch.tensor([1, 0]), 2).output(x, 300.0)
    assert len(calls) > made  # other images at other places


def test_parameters_of_encoders_are_listed_once_per_run(worded: Any) -> None:
    whole, lists = ode(worded, prompt="a red cat", guidance_scale=1.0), []
    for t in (900.0, 500.0, 100.0, 900.0, 500.0):
        whole.output(noise(2, 4, 8, 8), t)
        lists.append(whole.model._encodings._parameters)
    assert [a is b for a, b in pairwise(lists)] == [True, True, False, True]


def test_encodings_in_memory_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from iia_ode.diffusers import encodings

    monkeypatch.setattr(encodings, "_MOST", 4096)
    pipe = tiny.sd(**tiny.texts())
    whole, x = ode(pipe, prompt="a red cat", guidance_scale=1.0), noise(2, 4, 8, 8)
    known = whole.model._encodings
    assert len(known) > 0
    for n in range(1, 40):
        whole.output(noise(n, 4, 8, 8), 500.0)
    assert known._known._total <= 4096 and len(copy.deepcopy(known)) == 0
    assert torch.equal(whole.output(x, 500.0), ode(pipe, prompt="a red cat", guidance_scale=1.0).output(x, 500.0))


def test_changed_text_encoders_encode_anew() -> None:
    pipe = tiny.sd(**tiny.texts())
    whole, x = ode(pipe, prompt="a red cat", guidance_scale=1.0), noise(2, 4, 8, 8)
    before = whole.output(x, 500.0)
    assert torch.equal(whole.output(x, 500.0), before)
    with torch.no_grad():
        for parameter in pipe.text_encoder.parameters():
            parameter.mul_(1.5)
    assert gap(whole.output(x, 500.0), before) > 1e-4


def test_entries_of_adapters_and_one_image_are_not_entries_of_prompts(worded: Any) -> None:
    call = {"prompt": ["a cat", "a dog", "ship"], "ip_adapter_image": [1, 2, 3], "prompt_embeds": None}
    rows, shared, _ = arguments(worded, call)
    assert list(rows) == ["prompt"] and shared["ip_adapter_image"] == [1, 2, 3]
    pipe = tiny.sd("StableDiffusionImg2ImgPipeline")
    rows, shared, _ = arguments(pipe, {"prompt": ["a", "b", "c"], "image": torch.zeros(3, 8, 8)})
    assert list(rows) == ["prompt"] and shared["image"].shape == (3, 8, 8)


def test_a_list_of_generators_is_refused(worded: Any) -> None:
    with pytest.raises(iia.errors.InputError, match="give one generator"):
        ode(worded, prompt="a red cat", generator=[generator(), generator()])


def test_a_call_as_an_ode_leaves_the_pipeline_as_it_was(worded: Any) -> None:
    before = {k: v for k, v in vars(worded).items() if not k.startswith("_")}
    own, state = generator(), torch.get_rng_state()
    kept = own.get_state()
    ode(worded, prompt="a red cat", generator=own).output(noise(2, 4, 8, 8), 5.0)
    after = {k: v for k, v in vars(worded).items() if not k.startswith("_")}
    assert before.keys() == after.keys() and all(before[k] is after[k] for k in before)
    assert torch.equal(own.get_state(), kept) and torch.equal(torch.get_rng_state(), state)


def test_a_fingerprint_tells_networks_and_guidance_apart(sd: Any, model: Any) -> None:
    again = ode(sd, **tiny.sd_call(2))
    assert again.fingerprint() == model.fingerprint() and again.fingerprint().known
    assert ode(sd, **SD, guidance_rescale=0.5).fingerprint() != model.fingerprint()
    pipe, call = tiny.controlnet(), SD | {"image": twice(tiny.image())}
    strong, weak = (ode(pipe, **call, controlnet_conditioning_scale=w).fingerprint() for w in (1.0, 0.5))
    assert strong != weak
    other = tiny.sd()
    with torch.no_grad():
        next(other.unet.parameters()).add_(0.1)
    assert ode(other, **tiny.sd_call(4)).fingerprint() != model.fingerprint()


def test_another_shared_prompt_or_image_is_another_condition(worded: Any) -> None:
    digests = [conditions_digest(ode(worded, prompt=words)) for words in ("a red cat", "a blue dog", "a red cat")]
    assert digests[0] == digests[2] != digests[1]
    pipe, own = tiny.sd("StableDiffusionImg2ImgPipeline"), generator()
    whole = ode(pipe, **SD, **PICTURE, generator=own)
    digest = conditions_digest(whole)
    torch.randn(3, generator=own)
    assert conditions_digest(whole) == digest
    assert conditions_digest(ode(pipe, **SD, **PICTURE, generator=own)) != digest
    pictures = [[numpy_image(seed)] for seed in (1, 2, 1)]
    digests = [conditions_digest(ode(pipe, **tiny.sd_call(1), image=images)) for images in pictures]
    assert digests[0] == digests[2] != digests[1]


def numpy_image(seed: int) -> Any:
    return tiny.image(seed)[0].permute(1, 2, 0).numpy()


def test_a_model_that_goes_by_the_index_of_a_step_is_a_warning(sd: Any) -> None:
    from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback

    call = SD | {"image": twice(tiny.image())}
    with pytest.warns(MismatchWarning, match=r"control_guidance_start=0\.3 changes the model by the index"):
        ode(tiny.controlnet(), **call, control_guidance_start=0.3)
    with pytest.warns(MismatchWarning, match=r"skip_guidance_layers=\[0\] changes.*omit skip_guidance_layers\."):
        ode(tiny.sd3(), **SD3, skip_guidance_layers=[0], skip_layer_guidance_scale=2.0)
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=2)
    for callback in (cutoff, MultiPipelineCallbacks([cutoff])):
        with pytest.warns(MismatchWarning, match="callback_on_step_end changes the model by the index"):
            ode(sd, **SD, callback_on_step_end=callback)
    with warnings_as_errors():
        arguments(tiny.controlnet(), call | {"control_guidance_start": 0, "control_guidance_end": 1.0})
        arguments(sd, SD | {"callback_on_step_end": print})


def test_a_scheduler_tells_whole_timesteps_if_its_fit_did() -> None:
    pipe = tiny.ddim()
    grid = torch.tensor([999.0, 640.5, 260.2, -1.0], dtype=torch.float64)
    whole = ode(pipe, whole_timesteps=True)
    fit = iia.IIA("ddim", history=1, substeps=2, guard=False).fit(whole, noise(4, 3, 8, 8, seed=9), grid)
    assert IIAScheduler.of(fit, pipe.scheduler).whole_timesteps
    assert not IIAScheduler.of(fit, pipe.scheduler, whole_timesteps=False).whole_timesteps
    assert not IIAScheduler.of("ddim", pipe.scheduler).whole_timesteps


def test_the_guidance_scale_of_a_call_is_that_of_the_fit(sd: Any, model: Any, fit: Any) -> None:
    assert fit.record.origin.guidance_scale == model.guidance_scale == 7.5
    x = noise(4, 4, 8, 8, seed=9)
    with pytest.warns(MismatchWarning, match=r"fitted for guidance_scale 7\.5, and this ODE has 3\.0"):
        fit.check(ode(sd, **tiny.sd_call(4, guidance_scale=3.0)), x)
    view = model.condition(**model.conditioning)
    view.guidance_scale = 3.0
    assert torch.equal(view.output(x, 500.0), ode(sd, **tiny.sd_call(4, guidance_scale=3.0)).output(x, 500.0))
    assert not torch.equal(view.output(x, 500.0), model.output(x, 500.0))
    served = fit.serves(model, x, [3.0])
    assert [s.scale for s in served.record.served] == [3.0]
    view.guidance_scale = torch.tensor([3.0])
    with pytest.raises(iia.errors.InputError, match="scale of a pipeline is a number"):
        view.output(x, 500.0)


def test_samples_may_have_times_of_their_own(model: Any) -> None:
    x, t = noise(4, 4, 8, 8), torch.tensor([700.0, 20.0, 700.0, 3.0], dtype=torch.float64)
    found = model.output(x, t)
    for k in range(4):
        alone = model.subset(slice(k, k + 1), 4).output(x[k : k + 1], float(t[k]))
        assert gap(found[k : k + 1], alone) < BATCHED


def test_a_fit_of_a_pipeline_takes_its_weights_in_closed_form(worded: Any) -> None:
    worded.scheduler = tiny.sd_scheduler()
    whole = ode(worded, **WORDS)
    budget = iia.Budget(draws=8, teacher_steps=12, trials=2, starts=1)
    found = iia.fit(whole, 2, shape=whole.state_shape, samples=8, budget=budget)
    assert found.nfe == 2 and found.record.origin.conditioning.keys() == WORDS.keys()
    (used,) = found.record.in_use
    assert used.name == "DDIMScheduler(clip_sample=False, set_alpha_to_one=False)"
    assert (used.evaluations, used.samples) == (2, found.record.held_out)
    assert used.fit_error == found.record.endpoint.fit and f"| `{used.name}` | 2 | {used.error:.3g} |" in found.card()
    assert not whole.output(noise(3, 4, 8, 8).requires_grad_(), 500.0).requires_grad


@pytest.mark.parametrize("kind", ["DDIM", "EulerDiscrete", "HeunDiscrete", "EulerAncestralDiscrete", "flow"])
def test_the_scheduler_in_use_is_measured_as_it_is(sd: Any, kind: str) -> None:
    nfe = 5
    if kind == "flow":
        pipe, call = tiny.flux(), FLUX
        pipe.scheduler = flow(**SHIFTED)
    else:
        pipe, call, sd.scheduler = sd, SD, tiny.sd_scheduler(f"{kind}Scheduler")
    scheduler, whole = pipe.scheduler, ode(pipe, **call)
    x = noise(2, *whole.state_shape)
    name, evaluations, final = whole.sampled_in_use(x, nfe)
    steps = 3 if kind == "HeunDiscrete" else nfe  # of at most two evaluations
    draws = {"num_inference_steps": steps, "generator": generator(0), "output_type": "latent"}
    theirs = pipe(latents=x, **draws, **call).images
    assert name.startswith(type(scheduler).__name__) and evaluations == nfe and pipe.scheduler is scheduler
    assert gap(final, theirs) < ROUNDING


def test_a_card_has_the_scheduler_in_use_now(
    sd: Any, model: Any, fit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, solve, solved = noise(4, 4, 8, 8, seed=21), iia.Teacher.solve, []

    def solving(*args: Any, **kwargs: Any) -> Any:
        solved.append(solve(*args, steps=20, **kwargs))
        return solved[-1]

    monkeypatch.setattr(iia.Teacher, "solve", solving)
    sd.scheduler = IIAScheduler.of(fit, dpm())
    euler = tiny.sd_scheduler("EulerDiscreteScheduler", use_karras_sigmas=True)
    found = iia.diffusers.against(fit, model, x, [None, euler, tiny.sd_scheduler()])
    now, euler, ddim = iia.load(found.save(tmp_path / "fit")).record.in_use
    assert now.name == "DPMSolverMultistepScheduler()" and now.fit_error == euler.fit_error == ddim.fit_error
    assert euler.name == "EulerDiscreteScheduler(use_karras_sigmas=True)" and euler.samples == 4
    sd.scheduler = tiny.sd_scheduler()
    theirs = latents(sd, latents=x, num_inference_steps=3, **tiny.sd_call(4))
    assert ddim.error == pytest.approx(float((theirs - solved[0].final).square().mean().sqrt()), rel=1e-4)
    assert f"in use before: {euler.name}, 3 evaluations, error {euler.error:.3g}; fit" in str(found)
    assert "## The scheduler in use" in found.card() and f"| `{euler.name}` | 3 | {euler.error:.3g} |" in found.card()
    assert "The scheduler in use" not in fit.card()
    rough = replace(solved[0], record=replace(solved[0].record, error=2e3))
    monkeypatch.setattr(iia.Teacher, "solve", lambda *_, **__: rough)
    (used,) = iia.diffusers.against(fit, model, x).record.in_use
    assert used.error == used.fit_error == 2e3  # no error is known better than the true states


def test_a_fit_from_noised_images_is_not_measured_against_a_scheduler_that_begins_with_noise(
    sd: Any, model: Any, fit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sampled(ode: Any, x: Tensor, nfe: int, scheduler: Any = None) -> Sampled:
        return Sampled("any", nfe, x)

    monkeypatch.setattr(type(model), "sampled_in_use", sampled)
    x, t = noise(4, 4, 8, 8), 600.0  # level 2.3
    batch = Batch(model, x, final=x)
    assert at_fit(batch, t, 3, 0.5) and not at_fit(batch, 400.0, 3, 0.5)
    assert at_fit(replace(batch, signal=x), t, 3, 0.5) == ()
    grid = torch.tensor([400.0, 200.0, -1.0], dtype=torch.float64)
    late = iia.IIA("ddim", history=0, substeps=2, guard=False).fit(model, x, grid)
    with pytest.raises(iia.errors.InputError, match=r"begins at level .* in images with noise"):
        iia.diffusers.against(late, model, x)
    assert "sample(ode, 0.651523 * images + 0.758629 * noise, solver=fit)" in late.card()


def test_a_fit_from_images_is_known_as_one_at_every_level(sd: Any, model: Any, tmp_path: Path) -> None:
    quick = iia.Budget(teacher_steps=4, trials=2)
    level = model.schedule.noise_to_signal(600.0)  # 2.3, where a state of pure noise would do
    made = iia.fit(model, 2, images=noise(8, 4, 8, 8), sigma_max=level, budget=quick)
    fit = iia.load(made.save(tmp_path / "fit.safetensors"))
    with pytest.warns(MismatchWarning, match="noised no image"):
        draw(sd, IIAScheduler.of(fit, tiny.sd_scheduler()), num_inference_steps=2)
    with pytest.raises(iia.errors.InputError, match="in images with noise"):
        iia.diffusers.against(fit, model, noise(2, 4, 8, 8))
    assert " * images + " in fit.card()


def test_a_scheduler_that_cannot_run_is_refused_by_name(sd: Any, model: Any, fit: Any) -> None:
    x = noise(4, 4, 8, 8)
    with pytest.raises(iia.errors.InputError, match="DDIMInverseScheduler cannot run with StableDiffusionPipeline"):
        broken = tiny.sd_scheduler()
        broken.__class__ = type("DDIMInverseScheduler", (diffusers.DDIMScheduler,), {"step": None})
        model.sampled_in_use(x, 3, broken)
    plain = iia.ProbabilityFlowODE(iia.diffusers.denoiser(sd.unet), model.schedule, "noise")
    with pytest.raises(
        iia.errors.InputError, match=r"has no scheduler in use: make the ODE by iia_ode\.diffusers\.ode"
    ):
        iia.diffusers.against(fit, plain, x)


@pytest.mark.parametrize(
    ("call", "message"),
    [({"guidance": 2.0}, "has no 'guidance'"), ({"denoising_end": 0.5}, "made no step|has no 'denoising_end'")],
)
def test_a_call_that_is_no_ode_is_refused(sd: Any, call: dict[str, Any], message: str) -> None:
    with pytest.raises(iia.errors.InputError, match=message):
        ode(sd, **SD, **call)
    with pytest.raises(iia.errors.InputError, match="takes a pipeline of diffusers"):
        ode(sd.unet)
