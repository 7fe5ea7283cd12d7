"""Wrappers: whatever takes an ODE follows the changed output, and views keep their class."""

import copy
from typing import Any

import pytest
import torch
import torchdiffeq
from support import F64, mixture, normal
from torch import Tensor, nn

import iia_ode as iia
from iia_ode.experiments import compare
from iia_ode.experiments.settings import DrawnSetting
from iia_ode.iia import refine
from iia_ode.ode import Wrapped, cached

GRID = iia.grids.karras(3)
SHORT = torch.tensor([2.0, 1.0], dtype=F64)
INNER = iia.grids.karras(3, 0.1, 80.0, to_data=False)
BUDGET = iia.Budget(draws=16, teacher_steps=10, trials=2, starts=1, iterations=1)
C = torch.linspace(-0.5, 0.5, 16, dtype=F64)


def model(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
    """The mixture's denoiser, moved by a condition."""
    return mixture().denoise(x, 1.0, t[:, None]) + c[:, None]


def changed_model(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
    """The model with the change built in."""
    return 0.9 * model(x, t, c).tanh()


class Changed(Wrapped):
    """An ODE with the change."""

    def __init__(self, inner: iia.ProbabilityFlowODE, factor: float) -> None:
        super().__init__(inner)
        self.factor = factor

    def output(self, x: Tensor, t: Tensor | float) -> Tensor:
        """The changed output."""
        return self.factor * self.inner.output(x, t).tanh()


class Noise(Wrapped):
    """An ODE whose output is the noise."""

    def __init__(self, inner: iia.ProbabilityFlowODE) -> None:
        super().__init__(inner)
        self.prediction = "noise"

    def output(self, x: Tensor, t: Tensor | float) -> Tensor:
        """The noise that the inner ODE's output means."""
        return self.inner.noise(x, t)


class Changing(iia.ProbabilityFlowODE):
    """A subclass of the ODE itself, with an attribute of its own."""

    def __init__(self, *arguments: Any, factor: float, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.factor = factor

    def output(self, x: Tensor, t: Tensor | float) -> Tensor:
        """The changed output."""
        return self.factor * super().output(x, t).tanh()


def odes() -> dict[str, iia.ProbabilityFlowODE]:
    """The ODE of the changed model, and ODEs over the plain model that must do the same."""
    plain = iia.ProbabilityFlowODE(model, iia.EDM(), conditioning={"c": C})
    return {
        "twin": iia.ProbabilityFlowODE(changed_model, iia.EDM(), conditioning={"c": C}),
        "wrapped": Changed(plain, 0.9),
        "wrapped often, cached": Wrapped(cached(Changed(Wrapped(plain), 0.9))),
        "subclass": Changing(model, iia.EDM(), conditioning={"c": C}, factor=0.9),
    }


class OfODE(DrawnSetting):
    """A setting of an ODE with conditions for 16 samples."""

    name, reference_tolerance = "changed", 1e-3

    def __init__(self, ode: iia.ProbabilityFlowODE) -> None:
        self.ode = ode

    def _states(self, n: int, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        return {}, 80 * torch.randn((n, 4), generator=generator, dtype=F64)

    def _ode(self, conditions: dict[str, Tensor], guidance_scale: float, device: str) -> iia.ProbabilityFlowODE:
        return self.ode


def target(x: Tensor) -> Tensor:
    """Some final states."""
    return x / 80


PATHS = {
    "forms": lambda ode, x: torch.stack([ode.data(x, 2.0), ode.noise(x, 2.0), ode.velocity(x, 2.0), ode(2.0, x)]),
    "sample": lambda ode, x: iia.sample(ode, x, GRID, "dpmpp_2m"),
    "sample by torchdiffeq": lambda ode, x: iia.sample(ode, x, INNER, "dopri5", rtol=1e-3, atol=1e-3),
    "odeint": lambda ode, x: iia.odeint(ode, x, GRID, method="heun"),
    "torchdiffeq": lambda ode, x: torchdiffeq.odeint(ode, x, INNER, method="rk4"),
    "teacher": lambda ode, x: iia.Teacher.solve(ode, x, 80.0, 0.0, steps=6).final,
    "IIA": lambda ode, x: iia.IIA("ddim", "window", guard=False).fit(ode, x, GRID).plan,
    "preset": lambda ode, x: iia.preset("iia-edm", target="trajectory").fit(ode, x, GRID, chunk_size=7).plan,
    "fit": lambda ode, x: iia.fit(ode, 2, x=x, budget=BUDGET).plan,
    "refine": lambda ode, x: (
        refine(ode, x, iia.get_solver("ddim").plan(ode.schedule, GRID), target(x), iterations=1).plan
    ),
    "reference": lambda ode, x: iia.reference.trajectory(ode, x, 80.0, 1.0, points=3, rtol=1e-3, atol=1e-3).states,
    "statistics forwards": lambda ode, x: iia.ModelStatistics.estimate(ode, x, SHORT, points=2, mode="forward").s,
    "statistics in reverse": lambda ode, x: iia.ModelStatistics.estimate(ode, x, SHORT, points=2, mode="reverse").s,
    "compare": lambda ode, x: (
        compare(OfODE(ode), ["ddim", "iia-ddim"], [2], iia.grids.karras, samples=16, fit_samples=16)
        .csv()
        .split(",")[:9]
    ),
}


@pytest.mark.parametrize("path", PATHS)
def test_a_changed_output_is_followed_as_if_the_model_had_it(path):
    x = 80 * normal(16, 4)
    expected, *others = (PATHS[path](ode, x) for ode in odes().values())
    for found in others:
        assert torch.equal(found, expected) if isinstance(expected, Tensor) else found == expected


def test_a_wrapper_may_change_the_prediction_type():
    ode, x = odes()["twin"], 80 * normal(16, 4)
    noise = Noise(ode)
    assert noise.prediction == "noise" and ode.prediction == "data"
    assert torch.allclose(iia.sample(noise, x, GRID), iia.sample(ode, x, GRID), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["wrapped", "wrapped often, cached", "subclass"])
def test_views_keep_the_class_the_attributes_and_the_ledger(name):
    ode, twin, x = odes()[name], odes()["twin"], normal(16, 4)
    part, other = ode.subset(slice(3, 8), 16), ode.condition(c=-C)
    for view in (part, other, copy.deepcopy(ode)):
        assert type(view) is type(ode)
        assert vars(view).get("factor") == vars(ode).get("factor")
    assert part.ledger is other.ledger is ode.ledger
    assert torch.equal(part.output(x[3:8], 1.0), twin.subset(slice(3, 8), 16).output(x[3:8], 1.0))
    assert torch.equal(other.output(x, 1.0), twin.condition(c=-C).output(x, 1.0))
    assert torch.equal(ode.output(x, 1.0), twin.output(x, 1.0))  # not changed by its views
    with ode.counting() as spent:
        ode.data(x + 1, 1.0)
    assert (spent.evaluations, spent.samples) == (1, 16)


def test_parameters_are_those_of_every_layer_each_once():
    class Learned(Changed):
        """A wrapper with a parameter."""

        def __init__(self, inner: iia.ProbabilityFlowODE) -> None:
            super().__init__(inner, 1.0)
            self.factor = nn.Parameter(torch.ones((), dtype=F64))

    network = nn.Linear(4, 4, dtype=F64)
    ode = Wrapped(Learned(iia.ProbabilityFlowODE(lambda x, t: network(x), iia.EDM())))
    assert [name for name, _ in ode.named_parameters()] == ["inner.factor"]  # a function has no parameters

    class Net(nn.Module):
        """The network as a model."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = network

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            """The network's output."""
            return self.linear(x)

    ode = Wrapped(Learned(iia.ProbabilityFlowODE(Net(), iia.EDM())))
    assert len(ode.state_dict()) == len(list(ode.parameters())) == 3
    ode.output(normal(2, 4), 1.0).sum().backward()
    assert all(p.grad is not None for p in ode.parameters())
    assert ode.float().model.linear.weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["evaluate", "forward", "as_form", "data", "noise", "score", "v", "velocity"])
def test_a_subclass_with_a_method_that_solvers_would_pass_over_is_refused(name):
    for base, argument in ((iia.ProbabilityFlowODE, lambda: (model, iia.EDM())), (Wrapped, lambda: (odes()["twin"],))):
        own = type("Own", (base,), {name: lambda self, *arguments: None})
        with pytest.raises(
            iia.errors.InputError, match=f"Own overrides {name}, which a solver or a wrapper passes over"
        ):
            own(*argument())


def test_what_is_no_ode_is_not_wrapped():
    with pytest.raises(iia.errors.InputError, match="Changed wraps a ProbabilityFlowODE, got function"):
        Changed(model, 1.0)


def test_an_output_of_a_subclass_is_heard_by_views_and_by_the_teacher():
    class Always4(iia.ProbabilityFlowODE):
        """A model that always says 4."""

        def output(self, x: Tensor, t: Tensor | float) -> Tensor:
            """4, after an evaluation."""
            return 4.0 + 0.0 * super().output(x, t)

    ode, x = Always4(lambda x, t: 0 * x, iia.EDM(), "data"), 80 * normal(16, 3)
    for own in (ode, ode.condition(), ode.subset(slice(0, 16), 16), ode.to("cpu"), copy.deepcopy(ode)):
        assert type(own) is Always4
        assert iia.sample(own, x, GRID, "ddim").sub(4).abs().max() < 1e-12
    assert iia.Teacher.solve(ode, x, 80.0, 0.0, steps=3).final.sub(4).abs().max() < 1e-12


class PerSample(iia.ProbabilityFlowODE):
    """An ODE with a state per sample, in an attribute, a buffer and a parameter."""

    def __init__(self, mask: Tensor, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.plain = mask
        self.register_buffer("held", mask)
        self.learned = nn.Parameter(mask)

    def output(self, x: Tensor, t: Tensor | float) -> Tensor:
        """The output times the masks of the samples."""
        return (self.plain * self.held * self.learned)[:, None] * super().output(x, t)

    def subset(self, index: slice | Tensor, batch: int) -> "PerSample":
        """The ODE of some samples, with their masks."""
        view = super().subset(index, batch)
        view.plain, view.held, view.learned = self.plain[index], self.held[index], nn.Parameter(self.learned[index])
        return view


@pytest.mark.parametrize("wrap", [lambda o: o, Wrapped, cached, lambda o: Wrapped(cached(Wrapped(o)))])
def test_a_subclass_may_split_its_own_state_with_the_samples_under_any_wrapper(wrap):
    mask, x = torch.linspace(0.5, 0.9, 16, dtype=F64), 80 * normal(16, 4)
    ode = wrap(PerSample(mask, model, iia.EDM(), conditioning={"c": C}))
    twin = iia.ProbabilityFlowODE(
        lambda x, t, c, m: m[:, None] ** 3 * model(x, t, c), iia.EDM(), conditioning={"c": C, "m": mask}
    )
    with torch.no_grad():
        whole = ode.output(x, 2.0)
        assert torch.allclose(whole, twin.output(x, 2.0), rtol=1e-12)
        view = ode.subset(torch.tensor([5, 2]), 16)
        assert torch.equal(view.output(x[[5, 2]], 2.0), whole[[5, 2]])
        assert torch.equal(ode.output(x, 2.0), whole)  # not changed by its view
        assert view.ledger is ode.ledger
    fits = [iia.preset("iia-ddim").fit(o, x, GRID, chunk_size=5).plan for o in (ode, twin)]
    assert fits[0].difference(fits[1]) < 1e-9


def test_a_subclass_may_combine_the_branches_of_guidance_in_its_own_way():
    class Rescaled(iia.ProbabilityFlowODE):
        """Guidance whose result has the size of the conditional branch [Lin et al. 2023]."""

        def output(self, x: Tensor, t: Tensor | float) -> Tensor:
            """The rescaled combination."""
            condition, null = self.branches(x, t)
            guided = torch.lerp(null, condition, 3.0)
            return guided * condition.std(1, keepdim=True) / guided.std(1, keepdim=True)

    x = 80 * normal(16, 4)
    ode = Rescaled(model, iia.EDM(), conditioning={"c": C}, unconditional={"c": 0 * C})
    out, condition = ode.output(x, 2.0), ode.branches(x, 2.0)[0]
    assert torch.allclose(out.std(1), condition.std(1)) and not torch.allclose(out, condition)
    assert ode.nfe == 2
    assert torch.equal(Wrapped(ode).output(x, 2.0), out)
    assert torch.equal(Wrapped(ode).branches(x, 2.0)[0], condition)
    assert torch.isfinite(iia.Teacher.solve(Wrapped(ode), x, 80.0, 0.0, steps=3, chunk_size=5).final).all()
    with pytest.raises(iia.errors.InputError, match="unconditional="):
        iia.ProbabilityFlowODE(model, iia.EDM(), conditioning={"c": C}).branches(x, 2.0)


def test_conditions_and_scale_of_a_wrapper_are_those_of_its_inner_ode():
    plain = iia.ProbabilityFlowODE(model, iia.EDM(), conditioning={"c": C}, unconditional={"c": 0 * C})
    ode, x = Changed(Wrapped(plain), 0.9), 80 * normal(16, 4)
    ode.guidance_scale = 3.0
    assert plain.guidance_scale == 3.0
    plain.conditioning = {"c": -C}
    assert ode.conditioning["c"] is plain.conditioning["c"]
    twin = iia.ProbabilityFlowODE(changed_model, iia.EDM(), conditioning={"c": -C})
    plain.guidance_scale = 1.0
    assert torch.equal(ode.output(x, 2.0), twin.output(x, 2.0))
    view = ode.subset(slice(0, 3), 16)
    view.guidance_scale = 2.0
    assert ode.guidance_scale == 1.0
