"""Put the outcome of `iia-ode compare` into the documentation: python benchmarks/update_figures.py DIR.

Copies compare.png, samples.png and table.md. `make figures` runs the comparison first.
"""

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(made: Path) -> None:
    for name, folder in (("compare.png", "images"), ("samples.png", "images"), ("table.md", "results")):
        target = ROOT / "docs" / folder
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(made / name, target / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

