"""Pages of the experiments from the committed results: python benchmarks/experiment_pages.py [NAME ...].

`iia-ode experiment NAME --out benchmarks/results/experiments/NAME` measures, and the same command with the second seeds and
`--out benchmarks/results/experiments/NAME-again` repeats the measurement. This script then writes docs/experiments/NAME.md,
docs/images/experiments/NAME.png, and the overview docs/experiments/index.md.
"""

from __future__ import annotations

import argparse

from common import RESULTS, ROOT, say, write_page

from iia_ode.evidence import EXPERIMENTS, Claim, Experiment, Measurements, get_experiment, load
from iia_ode.evidence.page import claims_table, page
from iia_ode.evidence.running import about
from iia_ode.plots import save_figure

PAGES = ROOT / "docs" / "experiments"
IMAGES = ROOT / "docs" / "images" / "experiments"

OVERVIEW = """# Experiments

Each page asks a question about IIA {cite:p}`zhang2024iia`, and answers it by measurements on models that anyone can rebuild:
closed-form mixtures, and the packaged denoisers of [digits](../digits.md), [patches](../patches.md) and
[fashion](../fashion.md). `iia-ode experiment NAME` repeats an experiment from a clean clone, `--quick` makes a smoke run, and
an interrupted run goes on where it stopped. Every experiment was run twice, on different seeds; its page says how the two runs
agree. The verdicts below are those of both runs together. A method counts as better where a 95% interval over seeds says so.

## Claims and open questions

"""


def written(name: str) -> tuple[Experiment, list[Claim]]:
    """Write the page and the figure of an experiment; return its claims."""
    experiment, folder = get_experiment(name), RESULTS / "experiments" / name
    found, second = load(experiment, folder), RESULTS / "experiments" / f"{name}-again"
    again = (load(experiment, second), about(second)) if second.exists() else None
    figure = experiment.figure(found)
    save_figure(figure, IMAGES / f"{name}.png")
    write_page(PAGES / f"{name}.md", page(experiment, found, about(folder), f"../images/experiments/{name}.png", again))
    both = Measurements([*found.rows, *(again[0].rows if again else ())])
    return experiment, list(experiment.claims(both))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(EXPERIMENTS), help="experiments (default: all with results)")
    names = [n for n in parser.parse_args().names if any((RESULTS / "experiments" / n).glob("seed-*.json"))]
    say(f"experiments: {', '.join(names)}")
    pages = [written(name) for name in names]
    if len(names) < len(EXPERIMENTS):
        say(f"no results of {', '.join(set(EXPERIMENTS) - set(names))}")
    claims = claims_table([(e, c) for e, own in pages for c in own], "{name}.md")
    lines = [f"- [{e.title}]({e.name}.md): {e.question}" for e, _ in pages]
    listing = "\n".join(["", "", "## Pages", "", *lines, ""])
    contents = "\n".join(["", "```{toctree}", ":hidden:", "", *[e.name for e, _ in pages], "```"])
    write_page(PAGES / "index.md", OVERVIEW + claims + listing + contents)


if __name__ == "__main__":
    main()
