"""Sphinx configuration; no build step needs a network."""

from __future__ import annotations

import os
import re
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

from iia_ode import __version__

project = "iia_ode"
author = "The iia_ode developers"
copyright = author
version = release = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx_click",
    "sphinx_copybutton",
    "sphinxcontrib.bibtex",
]
exclude_patterns = ["_build", "jupyter_execute", "results", "**.ipynb_checkpoints"]

html_theme = "furo"
html_title = f"iia_ode {release}"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["math.css"]

# Pages are programs: every build executes them, and one that raises fails the build.
nb_output_stderr = "warn"  # a page that warns fails the build too
# tqdm misses a package that draws its bars in notebooks; no page shows one.
os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")
# One thread each: the work is small, and on a busy machine threads that wait for each other cost more than they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_execution_in_temp = True  # what a page writes does not land among the sources
nb_merge_streams = True
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
smartquotes_action = "qe"  # two hyphens stay two hyphens, as in --out

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
# torch.nn.Module's docstrings are written for another configuration and would warn here.
autodoc_inherit_docstrings = False

bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "plain"
bibtex_reference_style = "author_year"

# What is copied is what one types: no prompts, no output.
copybutton_exclude = ".linenos, .gp, .go"

_HEADER = re.compile(r"(Parameters|Attributes|Returns|Raises|Warns)\n-+\n")
_EXAMPLES = re.compile(r"^Examples\n-+\n", re.MULTILINE)
_ENTRY = re.compile(r"(\S[^:\n]*?) : (.*)")
_MARKUP = re.compile(r"(``.*?``)|([|]|(?<=[\[ ])[*](?=\w+\]))", re.DOTALL)


def _numpy_sections(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Turn the numpy sections of a docstring into field lists, and escape ``|x|`` and ``[B, *shape]``.

    Napoleon reads ``name : text`` as a name and its type; in this package types stand in the signature and the text
    describes.
    """
    text, out, end = "\n".join(lines), [], 0
    text = _EXAMPLES.sub(".. rubric:: Examples\n\n", _MARKUP.sub(lambda m: m[1] or f"\\{m[2]}", text))
    for header in _HEADER.finditer(text):
        out.append(text[end : header.start()])
        entries: list[str] = []
        end = header.end()
        while end < len(text):
            stop = text.find("\n", end) + 1 or len(text)
            line = text[end:stop].rstrip()
            entry = _ENTRY.fullmatch(line)
            if entry and header[1] != "Returns":
                names = ", ".join(f"**{n.strip()}**" for n in entry[1].split(","))
                entries.append(f"    * {names}: {entry[2]}")
            elif line and (line.startswith(" ") or header[1] == "Returns"):
                entries.append(f"      {line.strip()}")
            else:
                break
            end = stop
        out.append("\n".join([f":{header[1]}:", *entries, "", ""]))
    lines[:] = "".join([*out, text[end:]]).split("\n")


def _mathml(translator: Any, text: str, *, as_block: bool) -> str:
    try:
        markup: str = tex2mathml(text, as_block=as_block)
    except MathError as error:
        raise ExtensionError(f"{translator.builder.current_docname}: {error} in the formula {text!r}") from error
    return markup


def _inline_math(translator: Any, node: nodes.math) -> None:
    translator.body.append(_mathml(translator, node.astext(), as_block=False))
    raise nodes.SkipNode


def _block_math(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{_mathml(translator, node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    # MathJax would be fetched by the reader's browser; MathML is drawn by the browser itself.
    app.add_html_math_renderer("mathml", (_inline_math, None), (_block_math, None))
    app.connect("autodoc-process-docstring", _numpy_sections)
