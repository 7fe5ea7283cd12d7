"""Measure solvers on guided models and on a flow, for the advice of docs/solvers/index.md: python benchmarks/choice.py.

Writes docs/results/choice.md, in about five minutes on one core. The network is the digits denoiser, the flow the closed-form
velocity of the mixture in 8 dimensions.
"""

from pathlib import Path

import torch

import iia_ode as iia
from iia_ode.experiments import compare, get_setting

OUT = Path(__file__).resolve().parent.parent / "docs" / "results" / "choice.md"
GUIDED = ("lms", "deis_lab3", "ipndm3", "ipndm", "spndm", "dpmpp_2m", "unipc2", "dpmpp_2s_blocks", "ddim")
FLOW = ("heun3", "plms", "spndm", "ab2", "ab3", "unipc_noise", "ipndm3", "deis_lab3", "dpmpp_2m", "heun", "ddim")


def guided(scale: float) -> str:
    """Errors on the guided digits denoiser."""
    ode, x = get_setting("digits").draw(16, seed=1, guidance_scale=scale)
    exact = iia.Teacher.solve(ode, x, 80.0, 0.0, steps=150).final
    return compare(ode, GUIDED, [8, 12, 20], x=x, reference=exact).table(markdown=True)


def flow() -> str:
    """Errors on flow matching, on grids uniform in time."""
    ode = get_setting("mixture").problem.ode(iia.FlowMatching())
    x = torch.randn((256, 8), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    grids = {"uniform": lambda n: iia.grids.uniform(n, 1.0, 0.0)}
    return compare(ode, FLOW, [6, 9, 15, 25], grids, x=x, tolerance=1e-7).table(markdown=True)


if __name__ == "__main__":
    parts = {f"Guidance scale {scale:g}": guided(scale) for scale in (2.0, 8.0)} | {"Flow matching": flow()}
    OUT.write_text("\n".join(f"**{title}**\n\n{table}\n" for title, table in parts.items()))
