"""Structured weights and warm starts in a fit, and in its file."""

from pathlib import Path

import pytest
import torch
from support import F64, normal
from torch import Tensor

import iia_ode as iia
from iia_ode.iia.directions import Window
from iia_ode.iia.warm_start import WarmStart
from iia_ode.plan import Bands, LinearMap, Matrices

SHAPE = (3, 8, 8)
P = Bands(SHAPE, 3, "luma-chroma")
VARIANCES = torch.tensor([4.0, 1.0, 0.1, 2.0, 0.5, 0.05], dtype=F64)


def data(x: Tensor, t: Tensor) -> Tensor:
    """The denoiser of Gaussian data with one variance per band and channel."""
    return LinearMap(P, VARIANCES / (VARIANCES + float(t[0]) ** 2))(x)


ODE = iia.ProbabilityFlowODE(data, iia.EDM())
GRID = torch.tensor([10.0, 3.0, 1.0, 0.0], dtype=F64)


def test_a_fit_with_a_weight_per_band_is_exact_where_each_band_has_one_variance(tmp_path: Path) -> None:
    x, unseen = 10 * normal(24, *SHAPE), 10 * normal(5, *SHAPE, seed=3)
    exact = LinearMap(P, (VARIANCES / (VARIANCES + 100)).sqrt())(unseen)
    errors = {}
    for terms in ("window", Window(3, "luma-chroma", SHAPE)):
        fit = iia.IIA("ddim", terms=terms, target="local").fit(ODE, GRID, x)
        errors[fit.record.terms] = float((iia.sample(ODE, unseen, solver=fit) - exact).abs().max())
    assert list(errors) == ["window", "window(bands=3, channels=luma-chroma)"]
    plain, banded = errors.values()
    assert banded < 1e-2 * plain and banded < 1e-3
    assert "band 1, luma" in fit.table() and fit.explain() and str(fit)
    back = iia.load(fit.save(tmp_path / "fit.safetensors"))
    assert torch.equal(iia.sample(ODE, unseen, solver=back), iia.sample(ODE, unseen, solver=fit))


def test_a_window_takes_its_shape_from_the_samples_and_refuses_those_of_another() -> None:
    x = 10 * normal(24, *SHAPE)
    terms = Window(bands=3, channels="luma-chroma")
    found, known = (iia.IIA("ddim", terms=t).fit(ODE, GRID, x) for t in (terms, Window(3, "luma-chroma", SHAPE)))
    assert found.plan.difference(known.plan) == 0.0
    assert iia.IIA("ddim", terms=terms).fit(ODE, GRID, x).record.terms == known.record.terms
    for wrong in (Window(3, "luma-chroma", (3, 16, 16)), Window(maps=Bands((8,), 2))):
        with pytest.raises(iia.errors.InputError, match="is for samples"):
            iia.IIA("ddim", terms=wrong).fit(ODE, GRID, x)
    with pytest.raises(iia.errors.InputError, match=r"which IIA\.fit sees"):
        _ = terms.projections


def test_a_users_own_projections_are_as_good_as_bands_and_go_into_the_file(tmp_path: Path) -> None:
    variances = torch.tensor([9.0, 1.0, 0.01], dtype=F64)
    axes = torch.linalg.qr(normal(6, 6).double()).Q
    own = Matrices(
        torch.stack([axes[:, part] @ axes[:, part].T for part in (slice(0, 2), slice(2, 3), slice(3, 6))]), (6,)
    )

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return LinearMap(own, variances / (variances + float(t[0]) ** 2))(x)

    ode = iia.ProbabilityFlowODE(denoise, iia.EDM())
    x, unseen = 10 * normal(64, 6).double(), 10 * normal(5, 6, seed=3).double()
    exact = LinearMap(own, (variances / (variances + 100)).sqrt())(unseen)
    fit = iia.IIA("ddim", terms=Window(maps=own), target="local").fit(ode, GRID, x)
    final = iia.sample(ode, unseen, solver=fit)
    plain = iia.IIA("ddim", terms="window", target="local").fit(ode, GRID, x)
    assert (
        float((final - exact).abs().max()) < 1e-3 < float((iia.sample(ode, unseen, solver=plain) - exact).abs().max())
    )
    back = iia.load(fit.save(tmp_path / "fit.safetensors"))
    assert torch.equal(iia.sample(ode, unseen, solver=back), final)


@pytest.mark.parametrize("per", [None, "c"])
def test_a_fit_behind_a_warm_start_is_saved_with_it(tmp_path: Path, per: str | None) -> None:
    labels = torch.arange(24) % 2
    ode = iia.ProbabilityFlowODE(lambda x, t, c: data(x, t), iia.EDM(), conditioning={"c": labels})
    samples, x = normal(24, *SHAPE), 80 * normal(24, *SHAPE, seed=1)
    by = {"labels": labels, "per": per} if per else {}
    warm = WarmStart.gaussian(iia.EDM(), 80.0, 10.0, samples=samples, shrink="dct", **by)
    fit = iia.IIA("ddim", terms="window").fit(ode, GRID, warm.apply(x, ode))
    whole = fit.after(warm)
    assert [r.index for r in whole.reports] == [r.index + 1 for r in fit.reports]
    back = iia.load(whole.save(tmp_path / "warm.safetensors"))
    assert torch.equal(iia.sample(ode, x, solver=back), iia.sample(ode, warm.apply(x, ode), solver=fit))
