"""Samplers with the contract of k-diffusion's functions, against loops written out by that contract."""

import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from support import F64, generator, mixture, normal

import iia_ode as iia
from iia_ode import kdiffusion
from iia_ode.errors import GridError, InputError, MismatchError, UnknownNameError

NODE = Path(__file__).parent.parent / "docs" / "examples" / "comfyui_node.py"
PROBLEM = mixture()


def sigmas(n=8, dtype=F64):
    return iia.grids.karras(n).to(dtype)


def denoiser(schedule=None):
    """A denoiser as k-diffusion has them: model(x, sigma, shift=...) returns an estimate of x_0."""
    ode = PROBLEM.ode(schedule or iia.EDM())
    seen = []

    def model(x, sigma, shift=0.0):
        assert sigma.shape == (len(x),) and sigma.dtype == x.dtype
        seen.append(float(sigma[0]))
        return ode.evaluate(x.double(), sigma.double()).data.to(x.dtype) + shift

    model.seen = seen
    return model


# ---- the contract, written out --------------------------------------------------------------------------------------


def euler(model, x, sigmas, callback):
    s_in = x.new_ones([len(x)])
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * s_in)
        callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x


def heun(model, x, sigmas, callback):
    s_in = x.new_ones([len(x)])
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * s_in)
        callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        d, dt = (x - denoised) / sigmas[i], sigmas[i + 1] - sigmas[i]
        if sigmas[i + 1] == 0:
            x = x + d * dt
        else:
            y = x + d * dt
            x = x + (d + (y - model(y, sigmas[i + 1] * s_in)) / sigmas[i + 1]) / 2 * dt
    return x


def dpmpp_2m(model, x, sigmas, callback):
    s_in, old = x.new_ones([len(x)]), None
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * s_in)
        callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        t, s = -sigmas[i].log(), -sigmas[i + 1].log()
        used = denoised
        if old is not None and sigmas[i + 1] > 0:
            r = (t + sigmas[i - 1].log()) / (s - t)
            used = (1 + 1 / (2 * r)) * denoised - old / (2 * r)
        x = (sigmas[i + 1] / sigmas[i]) * x - (t - s).expm1() * used
        old = denoised
    return x


@pytest.mark.parametrize(
    ("name", "loop"), [("euler", euler), ("heun", heun), ("dpmpp_2m", dpmpp_2m)], ids=["euler", "heun", "dpmpp_2m"]
)
def test_a_sampler_equals_the_loop_written_out_and_tells_its_callback_the_same(name, loop):
    x, ours, theirs = 80.0 * normal(5, 4), [], []
    name = name if name in iia.solver_names() else "ddim"  # Euler in sigma, where alpha = 1
    one, two = denoiser(), denoiser()
    found = kdiffusion.sampler(name)(one, x, sigmas(), None, ours.append, True)
    expected = loop(two, x, sigmas(), theirs.append)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    assert one.seen == pytest.approx(two.seen, rel=1e-12)
    for a, b in zip(ours, theirs, strict=True):
        assert set(a) == set(b) == {"x", "i", "sigma", "sigma_hat", "denoised"}
        assert (a["i"], float(a["sigma"]), float(a["sigma_hat"])) == (b["i"], float(b["sigma"]), float(b["sigma_hat"]))
        for key in ("x", "denoised"):
            torch.testing.assert_close(a[key], b[key], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", iia.solver_names())
def test_every_solver_is_a_sampler_that_equals_sample(name):
    x, told = 80.0 * normal(3, 4), []
    expected = iia.sample(PROBLEM.ode(iia.EDM()), x, sigmas(), name)
    found = kdiffusion.sampler(name)(denoiser(), x, sigmas(), callback=told.append)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    steps = [entry["i"] for entry in told]
    assert steps == list(range(name == "analytic_first_step", 8))


def test_a_sampler_takes_arguments_as_k_diffusion_passes_them():
    one = kdiffusion.sampler("heun")
    assert list(inspect.signature(one).parameters) == ["model", "x", "sigmas", "extra_args", "callback", "disable"]
    assert one.__name__ == "sample_heun"
    x, model = 80.0 * normal(3, 4), denoiser()
    plain = one(model, x, sigmas())
    shifted = one(model, x, sigmas(), extra_args={"shift": 1.0}, callback=None, disable=True)
    assert (shifted - plain).abs().mean() > 0.3
    assert torch.equal(one(model, x, sigmas()[:1]), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_states_keep_their_dtype_and_half_precision_is_integrated_in_single(dtype):
    x, seen = (80.0 * normal(5, 4)).to(dtype), []

    def model(state, sigma):
        seen.append((state.dtype, sigma.dtype))
        return denoiser()(state, sigma)

    found = kdiffusion.sampler("dpmpp_2m")(model, x, sigmas(dtype=torch.float32))
    assert found.dtype == dtype and set(seen) == {(dtype, dtype)}
    exact = kdiffusion.sampler("dpmpp_2m")(denoiser(), x.double(), sigmas())
    assert (found.double() - exact).abs().max() < {torch.float32: 1e-3}.get(dtype, 0.5)


def test_a_run_in_two_parts_goes_over_the_levels_of_each_part():
    """As with the first and the last steps of an image: the first part does not end at 0."""
    x, whole = 80.0 * normal(3, 4), sigmas()
    one = kdiffusion.sampler("ddim")
    middle = one(denoiser(), x, whole[:5])
    torch.testing.assert_close(one(denoiser(), middle, whole[4:]), one(denoiser(), x, whole), rtol=1e-9, atol=1e-10)


def test_flow_models_have_states_between_data_and_noise():
    levels, x, schedule = torch.linspace(1, 0, 7, dtype=F64), normal(3, 4), iia.FlowMatching()
    found = kdiffusion.sampler("ddim", flow=True)(denoiser(schedule), x, levels)
    expected = euler(denoiser(schedule), x, levels, lambda told: None)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    for name in ("dpmpp_2m", "heun", "unipc"):
        found = kdiffusion.sampler(name, flow=True)(denoiser(schedule), x, levels)
        torch.testing.assert_close(found, iia.sample(PROBLEM.ode(schedule), x, levels, name), rtol=1e-9, atol=1e-10)


# ---- fitted solvers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule", [iia.EDM(), iia.VP(), iia.Cosine(), iia.FlowMatching()], ids=lambda s: type(s).__name__
)
def test_a_fit_on_any_schedule_is_a_sampler_of_the_same_model(schedule):
    grid = iia.grids.karras(5, 0.02, 20.0, schedule=schedule)
    ode = PROBLEM.ode(schedule)
    x = schedule.sigma(float(grid[0])) * normal(40, 4)
    fit = iia.preset("iia-ddim").fit(ode, x, grid)
    start = x[:6] / schedule.alpha(float(grid[0]))
    levels = kdiffusion.sigmas_of(fit)
    assert levels.dtype == torch.float32 and levels[-1] == 0 and levels[0] == pytest.approx(20.0)
    found = kdiffusion.sampler(fit)(denoiser(), start, levels)
    torch.testing.assert_close(found, iia.sample(ode, x[:6], solver=fit), rtol=1e-4, atol=1e-4)
    again = kdiffusion.sampler(fit.plan)(denoiser(), start, levels.double())
    torch.testing.assert_close(again, found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("schedule", [iia.VP(), iia.FlowMatching()], ids=["VP", "FlowMatching"])
def test_a_fit_on_any_schedule_is_a_sampler_of_a_flow_model(schedule):
    grid = iia.grids.karras(5, 0.02, 20.0, schedule=schedule)
    ode, t = PROBLEM.ode(schedule), float(grid[0])
    x = schedule.sigma(t) * normal(40, 4)
    fit = iia.preset("iia-ddim").fit(ode, x, grid)
    start = x[:6] / (schedule.alpha(t) + schedule.sigma(t))
    found = kdiffusion.sampler(fit, flow=True)(
        denoiser(iia.FlowMatching()), start, kdiffusion.sigmas_of(fit, flow=True)
    )
    torch.testing.assert_close(found, iia.sample(ode, x[:6], solver=fit), rtol=1e-4, atol=1e-4)


def test_other_levels_than_those_of_a_fit_are_an_error_with_advice():
    fit = iia.preset("iia-ddim").fit(PROBLEM.ode(iia.EDM()), 80.0 * normal(16, 4), iia.grids.karras(5))
    one = kdiffusion.sampler(fit)
    for wrong in (sigmas(6), sigmas(5) * 1.01, sigmas(5)[1:]):
        with pytest.raises(MismatchError, match=r"has the sigmas 80, .* pass sigmas=iia_ode\.kdiffusion\.sigmas_of"):
            one(denoiser(), 80.0 * normal(2, 4), wrong)


def test_a_plan_from_pure_noise_is_no_sampler_of_a_model_with_finite_levels():
    plan = iia.get_solver("ddim").plan(iia.FlowMatching(), torch.linspace(1, 0, 5, dtype=F64))
    with pytest.raises(InputError, match="flow=True for a flow model"):
        kdiffusion.sigmas_of(plan)
    assert kdiffusion.sigmas_of(plan, flow=True).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize(
    ("solver", "levels", "error", "words"),
    [
        ("no", None, UnknownNameError, "unknown solver"),
        (3, None, InputError, "a name, a Solver"),
        ("ddim", [1.0, 0.0], InputError, "sigmas must be a float tensor"),
        ("ddim", torch.ones(2, 2), InputError, "sigmas must be a float tensor"),
        ("ddim", torch.tensor([1.0, 2.0, 0.5]), GridError, "grid"),
        ("ddim", torch.tensor([2.0, 1.0, 1.0, 0.0]), GridError, "grid"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(solver, levels, error, words):
    with pytest.raises(error, match=words):
        kdiffusion.sampler(solver)(denoiser(), normal(2, 4), levels)
    with pytest.raises(InputError, match="levels of their own"):
        kdiffusion.sigmas_of("ddim")


def test_an_output_of_another_shape_is_named():
    with pytest.raises(InputError, match="one real tensor"):
        kdiffusion.sampler("ddim")(lambda x, sigma: x[:1], 80.0 * normal(2, 4), sigmas())


# ---- ComfyUI ---------------------------------------------------------------------------------------------------------


class KSAMPLER:
    """ComfyUI's side: what it does with the function of a sampler."""

    def __init__(self, sampler_function, extra_options=None, inpaint_options=None):
        self.sampler_function, self.extra_options = sampler_function, extra_options or {}

    def sample(self, model, sigmas, extra_args, callback, noise, disable_pbar=False):
        def told(x):
            callback(x["i"], x["denoised"], x["x"], len(sigmas) - 1)

        return self.sampler_function(
            model,
            noise * sigmas[0],
            sigmas,
            extra_args=extra_args,
            callback=told,
            disable=disable_pbar,
            **self.extra_options,
        )


def test_the_nodes_of_comfyui_run_names_and_files_of_fits(tmp_path, monkeypatch):
    assert len(NODE.read_text().splitlines()) <= 60
    samplers = ModuleType("comfy.samplers")
    samplers.KSAMPLER = KSAMPLER
    monkeypatch.setitem(sys.modules, "comfy", SimpleNamespace(samplers=samplers))
    monkeypatch.setitem(sys.modules, "comfy.samplers", samplers)
    spec = importlib.util.spec_from_file_location("comfyui_node", NODE)
    node = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(node)
    for kind in node.NODE_CLASS_MAPPINGS.values():
        names = kind.INPUT_TYPES()["required"]
        assert list(names) == list(inspect.signature(getattr(kind, kind.FUNCTION)).parameters)[1:]
        assert isinstance(kind.RETURN_TYPES, tuple) and kind.CATEGORY
    assert set(node.NODE_DISPLAY_NAME_MAPPINGS) == set(node.NODE_CLASS_MAPPINGS)

    ode, steps = PROBLEM.ode(iia.EDM()), []
    fit = iia.preset("iia-ddim").fit(
        ode, 80.0 * torch.randn(16, 4, dtype=F64, generator=generator()), iia.grids.karras(5)
    )
    file = str(fit.save(tmp_path / "solver.safetensors"))
    (levels,) = node.IIASigmas().make(file, False)
    noise = normal(3, 4)
    for name, expected in ((file, iia.sample(ode, 80.0 * noise, solver=fit)), ("heun", None)):
        (chosen,) = node.IIASampler().make(name, False)
        found = chosen.sample(denoiser(), levels, {}, lambda i, *rest: steps.append(i), noise, disable_pbar=True)
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert steps == [*range(5), *range(5)]
