"""Put the outcome of `iia-ode compare` into the README and the documentation: python benchmarks/update_figures.py DIR.

Copies compare.png, samples.png and table.md, and replaces the README's table. `make figures` runs the comparison first.
"""

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- table: made by `make figures` -->", "<!-- end of table -->"


def main(made: Path) -> None:
    for name, folder in (("compare.png", "images"), ("samples.png", "images"), ("table.md", "results")):
        target = ROOT / "docs" / folder
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(made / name, target / name)
    readme = ROOT / "README.md"
    text = readme.read_text()
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    readme.write_text(f"{head}{BEGIN}\n\n{(made / 'table.md').read_text()}\n{END}{tail}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
