"""The pages: every block of Python compiles and names what the library has; a build of the pages runs the cells."""

import ast
import importlib
import re
from pathlib import Path

import pytest

import iia_ode

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(?:\{code-cell\}|python|py)\n(.*?)^```", re.DOTALL | re.MULTILINE)
WITH_CODE = [page for page in PAGES if BLOCK.search(page.read_text())]


def code(page: Path) -> ast.Module:
    """All blocks of a page as one program."""
    return ast.parse(
        "\n".join(re.sub(r"^:.*$", "", block, flags=re.MULTILINE) for block in BLOCK.findall(page.read_text()))
    )


def chain(node: ast.expr) -> list[str]:
    """The names of a chain of attributes, such as ["iia", "grids", "karras"]; empty for anything else."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return [node.id, *names] if isinstance(node, ast.Name) else []


def found(names: list[str]) -> bool:
    """Whether the library has the first attributes of a chain, as far as they are modules and classes."""
    value: object = iia_ode
    for name in names:
        if not hasattr(value, name):
            return False
        value = getattr(value, name)
        if not isinstance(value, type(iia_ode) | type):
            return True
    return True


@pytest.mark.parametrize("page", WITH_CODE, ids=[str(page.relative_to(ROOT)) for page in WITH_CODE])
def test_the_python_of_a_page_compiles_and_names_what_the_library_has(page: Path) -> None:
    unknown = []
    for node in ast.walk(code(page)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "iia_ode":
            module = importlib.import_module(node.module)
            unknown += [f"{node.module}.{a.name}" for a in node.names if not hasattr(module, a.name)]
        elif isinstance(node, ast.Attribute) and (names := chain(node))[:1] in (["iia"], ["iia_ode"]):
            unknown += [] if found(names[1:]) else [".".join(names)]
    assert sorted(set(unknown)) == []


def test_every_link_between_pages_leads_to_a_page() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#\s]+\.md)", page.read_text()):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name}: {link}"
