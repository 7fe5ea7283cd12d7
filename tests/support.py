"""What several test files share: the schedules, the problems, and comparisons at rounding error."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import iia_ode as iia
from iia_ode.cli import main
from iia_ode.forms import PREDICTIONS
from iia_ode.problems import Gaussian, Mixture
from iia_ode.testing import cases

F64 = torch.float64
EPS = torch.finfo(F64).eps

LINEAR_BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=F64)
ALPHAS_CUMPROD = (1 - LINEAR_BETAS).cumprod(0)

ALL_SCHEDULES = [
    iia.EDM(),
    iia.VE(),
    iia.VP(),
    iia.Cosine(),
    iia.FlowMatching(),
    iia.Discrete(ALPHAS_CUMPROD),
    iia.Schedule.from_functions(lambda t: 1 - t, lambda t: t),
]
SCHEDULE_IDS = [type(s).__name__ for s in ALL_SCHEDULES]

every_schedule = pytest.mark.parametrize("schedule", ALL_SCHEDULES, ids=SCHEDULE_IDS)
every_solver = pytest.mark.parametrize("name", iia.solver_names())


def in_turn(names: str, *lists: Sequence[Any]) -> pytest.MarkDecorator:
    """Each entry of the longest list with one of every other list, in turn: for what takes all of them the same way."""
    cases = [tuple(one[i % len(one)] for one in lists) for i in range(max(map(len, lists)))]
    return pytest.mark.parametrize(
        names, cases, ids=lambda v: type(v).__name__ if isinstance(v, iia.Schedule) else None
    )


every_solver_on_a_schedule = in_turn("name, schedule", iia.solver_names(), ALL_SCHEDULES)
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)

LAMS = st.floats(-4.0, 6.0)
"""Half-log-SNRs that every schedule reaches inside its time range (EDM's 80 is -4.38)."""


def gaussian() -> Gaussian:
    """Anisotropic Gaussian data in 3 dimensions, with its exact flow."""
    return cases.gaussian()


def mixture() -> Mixture:
    """Three components in 4 dimensions, each with its own widths: a nonlinear denoiser, sharper than that of the suite."""
    stds = torch.tensor([[0.4, 0.5, 0.3, 0.6], [0.3, 0.2, 0.7, 0.4], [0.5, 0.5, 0.2, 0.3]], dtype=F64)
    return Mixture(torch.tensor([0.5, 0.3, 0.2], dtype=F64), cases.mixture().means, stds)


class Recorder(nn.Module):
    """A linear network, 0.5 x + c, that keeps what it was called with."""

    def __init__(self, dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5, dtype=dtype))
        self.calls: list[dict[str, Any]] = []

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None, **others: Any) -> Tensor:
        self.calls.append({"x": x.detach(), "t": t, "c": c, **others})
        y = self.scale * x
        return y if c is None else y + c.reshape(len(x), -1).to(y)


def generator(seed: int = 0) -> torch.Generator:
    """A seeded source of random numbers."""
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    """Standard normal numbers, the same at every call."""
    return torch.randn(shape, dtype=F64, generator=generator(seed)).to(dtype)


def close(actual: Tensor | float, expected: Tensor | float, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Assert |actual - expected| <= atol + rtol |expected|, with equal shapes and dtypes; numbers count as float64."""
    a, b = (v if isinstance(v, Tensor) else torch.tensor(v, dtype=F64) for v in (actual, expected))
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of the command line."""
    try:
        main(arguments)
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def slope(errors: list[float], sizes: list[float]) -> float:
    """Order of convergence: the slope of log error against log size, by least squares."""
    x, y = [math.log(v) for v in sizes], [math.log(v) for v in errors]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)
