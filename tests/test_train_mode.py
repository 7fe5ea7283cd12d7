"""A model in train mode: one warning for each run that says what to do, and the mode in the record of a fit."""

import warnings

import pytest
import torch
from support import normal
from torch import nn

import iia_ode as iia
from iia_ode.errors import GuardWarning, TrainModeWarning
from iia_ode.iia import refine
from iia_ode.ode import Wrapped, cached
from iia_ode.ode.mode import in_training

GRID = iia.grids.karras(3, 0.05, 10.0)
INNER = iia.grids.karras(3, 0.05, 10.0, to_data=False)
X = 10 * normal(16, 3, dtype=torch.float32)
BUDGET = iia.Budget(draws=16, teacher_steps=4, trials=2, starts=1, iterations=1)


class Net(nn.Module):
    """A network with a module that depends on the mode."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.n = nn.Sequential(nn.Linear(3, 8), part, nn.Linear(8, 3))

    def forward(self, x, t):
        return self.n(x / (1 + t[:, None] ** 2).sqrt())


class OwnDropout(nn.Module):
    """Dropout by hand."""

    def forward(self, x):
        return nn.functional.dropout(x, 0.5, self.training)


def ode_of(model: object) -> iia.ProbabilityFlowODE:
    return iia.ProbabilityFlowODE(model, iia.EDM())


PATHS = {
    "sample": lambda ode: iia.sample(ode, X, GRID, "heun"),
    "sample by torchdiffeq": lambda ode: iia.sample(ode, X, INNER, "dopri5", rtol=1.0, atol=1.0),
    "odeint": lambda ode: iia.odeint(ode, X, GRID),
    "plan": lambda ode: iia.get_solver("ddim").plan(ode.schedule, GRID).run(ode, X),
    "teacher": lambda ode: iia.Teacher.solve(ode, X, 10.0, 0.0, steps=4, chunk_size=7),
    "IIA": lambda ode: iia.IIA("ddim", target="trajectory").fit(ode, X, GRID, chunk_size=7),
    "fit": lambda ode: iia.fit(ode, 1, x=X, sigma_max=10.0, budget=BUDGET),
    "refine": lambda ode: refine(ode, X, iia.get_solver("ddim").plan(ode.schedule, GRID), X / 10, iterations=1),
    "statistics": lambda ode: iia.ModelStatistics.estimate(ode, X, torch.tensor([2.0, 1.0]), points=2, batch_size=8),
    "reference": lambda ode: iia.reference.solve(ode, X, 10.0, 1.0, rtol=1.0, atol=1.0),
}


def issued(path: str, model: object) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", GuardWarning)
        PATHS[path](ode_of(model))
    return found


@pytest.mark.parametrize("path", PATHS)
def test_a_model_in_train_mode_gives_one_warning_at_the_line_of_the_user(path):
    found = issued(path, Net(nn.Dropout(0.1)))
    assert [w.category for w in found] == [TrainModeWarning]
    assert found[0].filename == __file__
    assert "Dropout n.1" in str(found[0].message) and "model.eval()" in str(found[0].message)
    assert issued(path, Net(nn.Dropout(0.1)).eval()) == []


@pytest.mark.parametrize("n", [1, 2])
def test_each_run_warns_again(n):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(n):
            iia.sample(ode_of(Net(nn.Dropout(0.1))), X, GRID)
    assert len(found) == n


class Idle(nn.Module):
    """A model that does not call its part."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x, t):
        return 0.5 * x


@pytest.mark.parametrize(
    "part",
    [
        nn.BatchNorm1d(8),
        nn.SyncBatchNorm(8),
        nn.AlphaDropout(),
        nn.RReLU(),
        OwnDropout(),
        nn.LSTM(3, 3, 2, dropout=0.1),
    ],
    ids=lambda p: type(p).__name__,
)
def test_every_module_that_depends_on_the_mode_is_found(part):
    with pytest.warns(TrainModeWarning, match=f"1 of its modules .{type(part).__name__} part"):
        iia.sample(ode_of(Idle(part)), X, GRID)


@pytest.mark.parametrize(
    "part",
    [nn.Tanh(), nn.Dropout(0.0), nn.LayerNorm(8), nn.BatchNorm1d(8, track_running_stats=False), nn.Dropout(0.1).eval()],
    ids=str,
)
def test_a_mode_without_effect_gives_no_warning(part, recwarn):
    iia.sample(ode_of(Net(part)), X, GRID)
    assert not recwarn.list


def test_the_modules_behind_functions_and_wrappers_are_found():
    net = Net(nn.Dropout(0.1))
    for ode in (ode_of(lambda x, t: net(x, t)), ode_of(net.forward), Wrapped(cached(ode_of(net)))):
        with pytest.warns(TrainModeWarning, match="Dropout n.1"):
            iia.sample(ode, X, GRID)


def test_the_mode_is_in_the_record_and_the_report_of_a_fit(tmp_path):
    net = Net(nn.BatchNorm1d(8))
    with pytest.warns(TrainModeWarning):
        fit = iia.preset("iia-ddim").fit(ode_of(net), X, GRID)
    assert iia.load(fit.save(tmp_path / "fit.safetensors")).record.origin.train_mode
    assert "in train mode" in str(fit)
    fit = iia.preset("iia-ddim").fit(ode_of(net.eval()), X, GRID)
    assert not fit.record.origin.train_mode and "train mode" not in str(fit)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit.script
def test_spectral_norms_and_scripted_dropout_in_train_mode_are_warned_of() -> None:
    norm = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(3, 3))
    drop = torch.jit.script(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(0.5)))
    for net in (norm, drop):
        ode = iia.ProbabilityFlowODE(lambda x, t, net=net: net(x), iia.EDM())
        with pytest.warns(iia.errors.TrainModeWarning):
            iia.sample(ode, 80 * torch.randn(4, 3), iia.grids.karras(3), "ddim")


class Checkpointed(nn.Module):
    """A model with gradient checkpointing, which changes no output."""

    gradient_checkpointing = False

    def forward(self, x, t):
        if self.training and self.gradient_checkpointing:
            return torch.utils.checkpoint.checkpoint(torch.tanh, x, use_reentrant=False)
        return torch.tanh(x)


class Noisy(Checkpointed):
    def forward(self, x, t):
        return x + 1 if self.training or self.gradient_checkpointing else x


def test_gradient_checkpointing_alone_is_no_reason_for_a_warning():
    assert in_training(ode_of(Checkpointed().train())) == []
    assert in_training(ode_of(Noisy().train())) == ["Noisy model"]
