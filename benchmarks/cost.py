"""Cost of a closed-form fit: python benchmarks/cost.py writes docs/results/cost.md. Run it on an idle machine.

The fit is on the digits denoiser, with 256 draws and all defaults. The page has wall-clock time, sample evaluations, and the
share of the time outside the model: searches, least squares, targets, and storing the batch.
"""

import argparse
import os
import time
from pathlib import Path

import torch
from common import PAGES, number, setting_of, table, write_page
from torch import Tensor, nn

import iia_ode as iia

NAME, SAMPLES, NFES = "digits", 256, (4, 5, 6, 8, 10, 15)

PAGE = f"""# Cost of a fit

A closed-form fit of the {NAME} denoiser with {SAMPLES} draws takes {{seconds}} seconds of wall-clock time with {{where}};
{{rest}} of the time is spent outside the model.

{{table}}
`python benchmarks/cost.py` measures the fits and writes this page: `iia_ode.fit` with `budget="closed-form"` and all other
defaults. The machine multiplies float32 matrices of 2048x2048 at {{speed:.0f}} GFLOP/s. *Besides the model* is the share
of the time outside model evaluations: searches, least squares, targets, and storing the batch.
"""


class Timed(nn.Module):
    """A model that adds up the seconds spent in its calls."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.seconds = model, 0.0

    def forward(self, *args: Tensor, **conditions: Tensor) -> Tensor:
        """The output of the model, timed."""
        begun = time.perf_counter()
        out: Tensor = self.model(*args, **conditions)
        self.seconds += time.perf_counter() - begun
        return out


def speed() -> float:
    """Speed of float32 matrix multiplication in GFLOP/s, to compare seconds across days and machines."""
    size, seconds = 2048, []
    a = torch.ones(size, size)
    for _ in range(10):
        begun = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - begun)
    return 2e-9 * size**3 / min(seconds)


def span(cells: list[str]) -> str:
    """The least and the largest figure of a column, such as "30 to 79"."""
    least, *_, largest = sorted([*cells, *cells], key=lambda cell: float(cell.rstrip("%")))
    return f"{least} to {largest}"


def main() -> None:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--nfe", nargs="+", type=int, default=NFES, help="default: %(default)s")
    found.add_argument("--page", type=Path, default=PAGES / "cost.md", help="what is written (default: %(default)s)")
    options = found.parse_args()
    setting, lines = setting_of(NAME), []
    for nfe in options.nfe:
        ode, x = setting.draw(SAMPLES, 0)
        timed = Timed(ode.model)
        ode = iia.ProbabilityFlowODE(timed, ode.schedule, ode.prediction, conditioning=dict(ode.conditioning))
        begun = time.perf_counter()
        fit = iia.fit(ode, nfe, noise=x / setting.sigma_max, budget="closed-form")
        seconds = time.perf_counter() - begun
        spent = fit.record.sample_evaluations
        each, rest = 1e3 * timed.seconds / spent, 100 * (1 - timed.seconds / seconds)
        lines.append([str(nfe), f"{seconds:.0f}", str(spent), number(each, 2), number(rest, 1) + "%"])
        print(lines[-1], flush=True)
    where = f"{torch.get_num_threads()} threads on {os.cpu_count()} CPU cores"
    head = ["NFE", "seconds", "sample evaluations", "ms in the model for each", "besides the model"]
    spans = {key: span([line[k] for line in lines]) for key, k in (("seconds", 1), ("rest", 4))}
    write_page(options.page, PAGE.format(table=table(head, lines, left=0), where=where, speed=speed(), **spans))


if __name__ == "__main__":
    main()
