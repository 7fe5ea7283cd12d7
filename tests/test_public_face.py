"""The public face: few names, each documented whole; small files; no circle of imports."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import iia_ode as iia

PACKAGE = Path(iia.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
LAZY: dict[str, set[str]] = {}
"""Deliberately lazy imports: module to the modules of the package that its functions import."""

SHAPE = re.compile(r"\[[A-Za-z0-9*_.,+ /-]*\]|\bscalar\b")
DTYPE = re.compile(r"\bdtype|\bfloat(16|32|64)?\b|\bint(8|32|64)?\b|\binteger|\bbool(ean)?\b|\bcomplex")


# ---- names -----------------------------------------------------------------------------------------------------------


def test_there_are_at_most_36_names_and_each_exists_once() -> None:
    assert len(iia.__all__) <= 36
    assert len(set(iia.__all__)) == len(iia.__all__)
    assert all(hasattr(iia, name) for name in iia.__all__)


def _parts() -> dict[str, Any]:
    """All public functions and classes, and the public methods of the classes that take two arguments or more."""
    found: dict[str, Any] = {}
    seen: set[Any] = set()
    for name in iia.__all__:
        value = getattr(iia, name)
        if isinstance(value, ModuleType) or not callable(value):
            continue
        found[name] = value
        for key in sorted(dir(value)) if inspect.isclass(value) else ():
            static = inspect.getattr_static(value, key)
            method = static.__func__ if isinstance(static, classmethod | staticmethod) else static
            own = inspect.isfunction(method) and method.__module__.startswith("iia_ode") and method not in seen
            if own and not key.startswith("_") and len(_parameters(getattr(value, key))) >= 2:
                seen.add(method)
                found[f"{name}.{key}"] = getattr(value, key)
    return found


def _parameters(value: Any) -> dict[str, inspect.Parameter]:
    """The parameters of a function, or of a class as it is made."""
    try:
        found = inspect.signature(value).parameters
    except (TypeError, ValueError):
        return {}
    return {k: p for k, p in found.items() if k != "self" and not k.startswith("_")}


def _has(section: str, doc: str) -> bool:
    return re.search(rf"^{section}\n-+$", doc, re.MULTILINE) is not None


def _returns(value: Any) -> bool:
    if inspect.isclass(value):
        return False
    return inspect.signature(value).return_annotation not in (None, "None", inspect.Signature.empty, "NoReturn")


def _missing(name: str, value: Any) -> list[str]:
    """What the docstring of a public name lacks."""
    doc, parameters = inspect.getdoc(value) or "", _parameters(value)
    if not doc:
        return ["a docstring"]
    missing = []
    described = _has("Parameters", doc) or (inspect.isclass(value) and _has("Attributes", doc))
    if parameters and not described:
        missing.append("Parameters")
    missing += [
        f"parameter {key}"
        for key in parameters
        if described and not re.search(rf"^[*\w, ]*\b{key}\b[*\w, ]*:", doc, re.MULTILINE)
    ]
    if _returns(value) and not _has("Returns", doc) and not _has("Yields", doc):
        missing.append("Returns")
    if parameters and "." not in name and not _has("Raises", doc):
        missing.append("Raises")
    annotations = [str(p.annotation) for p in parameters.values()]
    if not inspect.isclass(value):
        annotations.append(str(inspect.signature(value).return_annotation))
    if any(re.search(r"\bTensor\b", text) for text in annotations):
        missing += ["a shape"] * (not SHAPE.search(doc)) + ["a dtype"] * (not DTYPE.search(doc))
    return missing


PARTS = _parts()


@pytest.mark.parametrize("name", PARTS)
def test_a_public_name_has_its_arguments_results_errors_shapes_and_dtypes_documented(name: str) -> None:
    assert _missing(name, PARTS[name]) == []


def test_what_the_check_of_docstrings_finds() -> None:
    def bare(x: torch.Tensor) -> torch.Tensor:
        """Return x."""
        return x

    def whole(x: torch.Tensor) -> torch.Tensor:
        """Return x.

        Parameters
        ----------
        x : a state [B, ...], floating-point dtype.

        Returns
        -------
        The same state.

        Raises
        ------
        InputError : x is no tensor.
        """
        return x

    assert _missing("bare", bare) == ["Parameters", "Returns", "Raises", "a shape", "a dtype"]
    assert _missing("whole", whole) == []


# ---- structure -------------------------------------------------------------------------------------------------------


def _module(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module(path): path for path in FILES}


def _targets(path: Path, node: ast.stmt) -> set[str]:
    """The modules of the package that an import statement loads."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names if alias.name in MODULES}
    if not isinstance(node, ast.ImportFrom):
        return set()
    package = _module(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    base = package[: len(package) - node.level + 1] if node.level else []
    origin = ".".join([*base, *([node.module] if node.module else [])])
    if origin not in MODULES:
        return set()
    inside = {f"{origin}.{alias.name}" for alias in node.names}
    modules = {name for name in inside if name in MODULES}
    # `from package import name` loads the package itself only where the name is no module of it.
    return modules | ({origin} if len(modules) < len(inside) else set())


def _imports(path: Path) -> tuple[set[str], set[str]]:
    """Modules of the package that a file imports at its top, for typing too, and those that its functions import."""
    at_load: set[str] = set()
    later: set[str] = set()

    def visit(node: ast.AST, inside: bool) -> None:
        if isinstance(node, ast.Import | ast.ImportFrom):
            (later if inside else at_load).update(_targets(path, node))
        for child in ast.iter_child_nodes(node):
            visit(child, inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    visit(ast.parse(path.read_text()), False)
    return at_load, later


IMPORTS = {name: _imports(path) for name, path in MODULES.items()}


def _circle(edges: dict[str, set[str]]) -> list[str]:
    """A circle of imports, as the modules on it; empty if there is none."""
    done: set[str] = set()

    def search(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(edges[name]):
            if found := search(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in edges if (found := search(name, []))), [])


def test_no_import_goes_in_a_circle() -> None:
    assert _circle({name: at_load - {name} for name, (at_load, _) in IMPORTS.items()}) == []


def test_no_function_imports_another_module_of_the_package() -> None:
    lazy = {name: later for name, (_, later) in IMPORTS.items() if later}
    assert {name: later - LAZY.get(name, set()) for name, later in lazy.items() if later - LAZY.get(name, set())} == {}


def test_no_file_is_longer_than_400_lines_and_no_class_than_250() -> None:
    long = {str(path.relative_to(PACKAGE)): n for path in FILES if (n := len(path.read_text().splitlines())) > 400}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and (n := (node.end_lineno or 0) - node.lineno + 1) > 250:
                long[f"{path.relative_to(PACKAGE)}: {node.name}"] = n
    assert long == {}


# ---- imports ---------------------------------------------------------------------------------------------------------


def test_the_import_loads_no_package_that_few_programs_need() -> None:
    heavy = ("torchdiffeq", "matplotlib", "sklearn", "diffusers", "transformers", "PIL")
    parts = ("scipy.special", "scipy.interpolate", "scipy.integrate", "scipy.optimize", "scipy.linalg")
    new = f"set({heavy + parts}) & (set(sys.modules) - before)"
    program = f"import sys, torch; before = set(sys.modules); import iia_ode; print(*({new}))"
    loaded = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True).stdout
    assert loaded.split() == []
