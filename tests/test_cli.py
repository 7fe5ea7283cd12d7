"""The command line's grids: families by name, and what goes with which."""

import pytest
import torch
from support import F64, run

from iia_ode import grids
from iia_ode.experiments import get_setting
from iia_ode.files import read_tensors

MIXTURE = get_setting("mixture")
ENDS = {"sigma_min": MIXTURE.sigma_min, "sigma_max": MIXTURE.sigma_max, "schedule": MIXTURE.schedule}


def grid_of(tmp_path, capsys, *options):
    """The grid that `iia-ode sample` used."""
    command = ["sample", "ddim", "--setting", "mixture", "--samples", "2", "--nfe", "5", "--out", str(tmp_path)]
    status, _, error = run(capsys, *command, *options)
    assert (status, error) == (0, "")
    return torch.tensor(read_tensors(tmp_path / "samples.safetensors", "samples")[1]["grid"], dtype=F64)


@pytest.mark.parametrize("name", grids.GRIDS)
def test_every_family_of_noise_levels_has_its_name_on_the_command_line(tmp_path, capsys, name):
    assert torch.equal(grid_of(tmp_path, capsys, "--grid", name), grids.GRIDS[name](5, **ENDS))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], grids.karras(5, **ENDS)),
        (["--rho", "3"], grids.karras(5, rho=3.0, **ENDS)),
        (["--rho", "0"], grids.log_snr(5, **ENDS)),
        (["--grid", "polyexponential", "--rho", "1.5"], grids.polyexponential(5, rho=1.5, **ENDS)),
        (["--grid", "beta", "--sigma-min", "0.1"], grids.beta(5, **{**ENDS, "sigma_min": 0.1})),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_the_exponent_goes_to_the_family_that_has_one(tmp_path, capsys, options, expected):
    assert torch.equal(grid_of(tmp_path, capsys, *options), expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--grid", "log_snr", "--rho", "7"], "--rho goes with --grid karras or polyexponential, not with log_snr"),
        (["--grid", "polyexponential", "--rho", "0"], "rho must be positive"),
        (["--rho", "0.01"], "0.01 is too small"),
        (["--grid", "spline"], "'spline' is not one of"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_options_that_do_not_go_together_are_one_line_of_error(tmp_path, capsys, options, words):
    status, _, error = run(capsys, "sample", "ddim", "--setting", "mixture", "--out", str(tmp_path), *options)
    assert (status, len(error.splitlines())) == (2, 1)
    assert words in error


def test_a_fitted_solver_brings_its_grid_and_takes_no_other(tmp_path, capsys):
    path = str(tmp_path / "fit.safetensors")
    fit = [
        "fit",
        "--setting",
        "mixture",
        "--preset",
        "iia-ddim",
        "--samples",
        "8",
        "--nfe",
        "4",
        "--grid",
        "linear_log",
    ]
    assert run(capsys, *fit, "--out", path)[0] == 0
    status, _, error = run(capsys, "sample", path, "--setting", "mixture", "--grid", "karras", "--out", str(tmp_path))
    assert status == 2 and "leave out --grid" in error
