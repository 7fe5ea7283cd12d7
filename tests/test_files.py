"""Files: what is saved comes back, what is wrong is refused, nothing is half written."""

import json
import os
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from support import ALL_SCHEDULES, ALPHAS_CUMPROD, mixture

import iia_ode as iia
from iia_ode.denoisers.pretrained import DIGITS_WEIGHTS
from iia_ode.files import read_tensors, write_bytes, write_tensors
from iia_ode.iia import PRESETS
from iia_ode.plan.plan import Combine, Evaluate

F64 = torch.float64


def ode_on(schedule, **options):
    return mixture().ode(schedule, **options)


def fitted(schedule=None, name="iia-edm", dtype=F64, n=4, **options):
    schedule = schedule or iia.EDM()
    grid = iia.grids.karras(n, schedule=schedule, sigma_max=40.0)
    x = states(schedule).to(dtype)
    return iia.preset(name).fit(ode_on(schedule, **options), grid, x, seed=7)


def states(schedule, seed=0):
    t = schedule.t_of_noise_to_signal(40.0)
    return mixture().noisy(6, schedule, t, torch.Generator().manual_seed(seed))


@settings(max_examples=25)
@given(st.sampled_from(sorted(PRESETS)), st.sampled_from(ALL_SCHEDULES), st.sampled_from([torch.float32, F64]))
def test_samples_after_loading_are_bit_equal_to_those_before_saving(tmp_path_factory, name, schedule, dtype):
    fit = fitted(schedule, name, dtype)
    path = fit.save(tmp_path_factory.mktemp("fit") / "fit.safetensors")
    again = iia.load(path, schedule=schedule)
    x = states(schedule, seed=1).to(dtype)
    ode = ode_on(schedule)
    assert torch.equal(iia.sample(ode, x, solver=fit), iia.sample(ode, x, solver=again))
    assert (again.about, again.reports, again.name, again.nfe) == (fit.about, fit.reports, fit.name, fit.nfe)
    assert torch.equal(again.grid, fit.grid)
    assert str(again) == str(fit)


def test_the_file_is_plain_safetensors_with_one_json_string(tmp_path):
    path = fitted().save(tmp_path / "fit.safetensors")
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["iia_ode"])
        dtypes = {key: file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
    assert dtypes == {"grid": F64, "times": F64, "weights": F64}
    about = header["about"]
    assert header["kind"] == "fitted solver"
    assert header["format"] == 1
    assert about["library"] == iia.__version__
    assert about["base"] == {"name": "heun", "options": {}}
    assert about["target"] == {"name": "substeps", "substeps": 3}
    assert about["schedule"] == {"type": "EDM"}
    assert (about["terms"], about["prediction"], about["history"], about["ridge"]) == ("iia-edm", "data", 1, 0.0)
    assert (about["batch"], about["seed"], about["state_shape"], about["state_dtype"]) == (6, 7, [4], "float64")
    assert len(header["reports"]) == 3


def test_a_discrete_schedule_travels_with_the_fit(tmp_path):
    path = fitted(iia.Discrete(ALPHAS_CUMPROD)).save(tmp_path / "fit.safetensors")
    assert iia.load(path).plan.schedule == iia.Discrete(ALPHAS_CUMPROD)


def test_a_schedule_from_functions_has_to_be_given_and_has_to_be_the_same(tmp_path):
    mine = iia.from_functions(lambda t: 1 - t, lambda t: t)
    other = iia.from_functions(lambda t: 1 - t * t, lambda t: t)
    path = fitted(mine).save(tmp_path / "fit.safetensors")
    with pytest.raises(iia.FileFormatError, match="pass schedule="):
        iia.load(path)
    with pytest.raises(iia.MismatchError, match="was fitted for schedule FromFunctions"):
        iia.load(path, schedule=other)
    assert iia.load(path, schedule=mine).nfe == 7


def test_weights_that_are_tensors_and_constants_come_back_too(tmp_path):
    weight = torch.tensor([1.0, 2.0, 0.5, 0.25], dtype=F64)
    code = (Evaluate(0, 40.0, "data"), Combine(((0, weight), (1, -0.5)), torch.ones(4, dtype=F64), step=1))
    plan = iia.Plan(iia.EDM(), (40.0, 1.0), code, "mine")
    fit = iia.FittedSolver(plan, (), fitted().about)
    again = iia.load(fit.save(tmp_path / "fit.safetensors"))
    x = states(iia.EDM())
    assert torch.equal(again.plan.run(ode_on(iia.EDM()), x), plan.run(ode_on(iia.EDM()), x))


# ---- a fit is used only where it belongs -----------------------------------------------------------------------------


def test_a_file_fitted_for_another_schedule_is_refused(tmp_path):
    fit = iia.load(fitted(iia.EDM()).save(tmp_path / "fit.safetensors"))
    with pytest.raises(iia.MismatchError, match=r"fitted for schedule .*EDM.* this ODE has .*VP.*Fit again"):
        iia.sample(ode_on(iia.VP()), states(iia.EDM()), solver=fit)
    vp = fitted(iia.VP())
    with pytest.raises(iia.MismatchError, match="schedule"):
        iia.sample(ode_on(iia.VP(beta_1=19.0)), states(iia.VP()), solver=vp)


def test_another_prediction_type_or_guidance_scale_or_condition_or_shape_is_refused():
    fit, x = fitted(), states(iia.EDM())
    with pytest.raises(iia.MismatchError, match="prediction data, and this ODE has noise"):
        iia.sample(ode_on(iia.EDM(), prediction="noise"), x, solver=fit)

    def model(x, t, y):
        return torch.zeros_like(x)

    def guided(scale, **conditioning):
        null = {k: torch.zeros(1) for k in conditioning}
        return iia.ProbabilityFlowODE(
            model, iia.EDM(), conditioning=conditioning, unconditional=null, guidance_scale=scale
        )

    own = iia.preset("iia-ddim").fit(guided(2.0, y=torch.ones(6)), iia.grids.karras(3), x)
    with pytest.raises(iia.MismatchError, match=r"guidance_scale 2.0, and this ODE has 3.0"):
        iia.sample(guided(3.0, y=torch.ones(6)), x, solver=own)
    with pytest.raises(iia.MismatchError, match=r"conditioning \['y'\], and this ODE has \['z'\]"):
        iia.sample(guided(2.0, z=torch.ones(6)), x, solver=own)
    with pytest.raises(iia.MismatchError, match=r"states \[B, 4\], got \[6, 2, 2\]"):
        iia.sample(guided(2.0, y=torch.ones(6)), x.reshape(6, 2, 2), solver=own)


def test_a_fit_brings_its_own_grid():
    fit, x = fitted(), states(iia.EDM())
    assert torch.equal(iia.sample(ode_on(iia.EDM()), x, fit.grid, fit), iia.sample(ode_on(iia.EDM()), x, solver=fit))
    with pytest.raises(iia.MismatchError, match="brings its own grid of 5 times"):
        iia.sample(ode_on(iia.EDM()), x, iia.grids.karras(7), fit)


def test_other_weights_of_the_model_give_a_warning_and_the_same_weights_none():
    torch.manual_seed(0)
    first, second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def ode(layer):
        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = layer

            def forward(self, x, t):
                return self.layer(x / (1 + t[:, None]))

        return iia.ProbabilityFlowODE(Model(), iia.EDM())

    x = states(iia.EDM()).float()
    fit = iia.preset("iia-edm").fit(ode(first), iia.grids.karras(3), x)
    with pytest.warns(iia.FingerprintWarning, match="its weights were not made for it"):
        iia.sample(ode(second), x, solver=fit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        iia.sample(ode(first), x, solver=fit)


# ---- damaged files ---------------------------------------------------------------------------------------------------


def test_a_missing_foreign_or_truncated_file_is_refused(tmp_path):
    with pytest.raises(iia.FileFormatError, match="no file"):
        iia.load(tmp_path / "nothing.safetensors")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(iia.FileFormatError, match="not a readable safetensors file"):
        iia.load(tmp_path / "text")
    path = fitted().save(tmp_path / "fit.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(iia.FileFormatError, match="not a readable safetensors file"):
        iia.load(path)
    save_file({"weights": torch.ones(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(iia.FileFormatError, match="not written by iia_ode"):
        iia.load(tmp_path / "foreign.safetensors")


def test_a_file_of_another_kind_or_a_newer_format_is_refused(tmp_path):
    with pytest.raises(iia.FileFormatError, match="holds a 'denoiser', expected a 'fitted solver'"):
        iia.load(DIGITS_WEIGHTS)
    path = fitted().save(tmp_path / "fit.safetensors")
    rewrite(path, lambda header, tensors: header.update(format=99))
    with pytest.raises(iia.FileFormatError, match=r"format version 99; this iia_ode reads up to 1. Upgrade"):
        iia.load(path)


def rewrite(path, change):
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["iia_ode"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    change(header, tensors)
    save_file(tensors, path, {"iia_ode": json.dumps(header)})


@pytest.mark.parametrize(
    "change",
    [
        lambda header, tensors: header.pop("code"),
        lambda header, tensors: header["about"].pop("schedule"),
        lambda header, tensors: header["code"].pop(),
        lambda header, tensors: header["code"].append(["combine", [99], None]),
        lambda header, tensors: header["reports"][0].update(unknown=1),
        lambda header, tensors: tensors.pop("weights"),
        lambda header, tensors: tensors.update(weights=tensors["weights"][:-1]),
        lambda header, tensors: tensors.update(weights=tensors["weights"] * torch.nan),
        lambda header, tensors: tensors.update(times=tensors["times"][:-1]),
    ],
)
def test_a_damaged_header_or_tensor_is_refused(tmp_path, change):
    path = fitted().save(tmp_path / "fit.safetensors")
    rewrite(path, change)
    with pytest.raises(iia.FileFormatError, match="damaged"):
        iia.load(path)


# ---- writing ---------------------------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = fitted().save(tmp_path / "fit.safetensors")
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(OSError, match="disk full"):
                fitted(n=6).save(path)
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["fit.safetensors"]


def test_a_header_that_is_not_plain_json_is_refused_before_anything_is_written(tmp_path):
    for value in (torch.ones(1), float("nan"), object()):
        with pytest.raises(iia.FileFormatError, match="not plain JSON"):
            write_tensors(tmp_path / "x.safetensors", "test", {}, {"value": value})
    assert os.listdir(tmp_path) == []


def test_written_tensors_come_back_from_any_layout(tmp_path):
    tensor = torch.arange(12.0).reshape(3, 4).T
    path = write_tensors(tmp_path / "new folder" / "x.safetensors", "test", {"t": tensor}, {"note": "ok"})
    tensors, header = read_tensors(path, "test")
    assert torch.equal(tensors["t"], tensor)
    assert header["note"] == "ok"


def test_a_written_file_has_the_permissions_of_any_new_file(tmp_path):
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    assert write_bytes(tmp_path / "ours", b"").stat().st_mode == plain.stat().st_mode
