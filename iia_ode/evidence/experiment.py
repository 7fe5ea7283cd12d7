"""An experiment: a question, cells of measurements, and the answer that the measurements give."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..experiments.tables import markdown
from .measurements import Measurements, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Cell", "Claim", "Experiment", "Part", "markdown"]


@dataclass(frozen=True)
class Cell:
    """A part of an experiment that is measured in one go and kept.

    Attributes
    ----------
    name : name of the cell; no two cells of an experiment have the same.
    measure : function from a seed and a folder to rows. The folder is for intermediate results that a second call may use.
    """

    name: str
    measure: Callable[[int, Path], list[Row]]


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, or a question that the paper left open.

    Attributes
    ----------
    text : the claim or the question, with its place in the paper.
    measured : what was measured, with its standard error, in at most 25 words.
    verdict : ``"confirmed"``, ``"refuted"``, ``"not resolved"``, or an answer in at most six words.
    """

    text: str
    measured: str
    verdict: str


@dataclass(frozen=True)
class Part:
    """A table of a page.

    Attributes
    ----------
    caption : a sentence that says what the numbers are, with units.
    table : the table in Markdown.
    """

    caption: str
    table: str


class Experiment(ABC):
    """A question about solvers, answered by measurements over seeds.

    Attributes
    ----------
    name : name on the command line.
    title : heading of the page.
    question : the question, a sentence or two.
    keys : columns that name a row, besides ``seed``.
    values : measured columns that a second run on other seeds should reproduce within the stated spread. Times of the clock
        do not belong here.
    seeds : default seeds.
    again : seeds of the second run.
    fits_of : commit of the stored fits, where the fits have changed since; empty where they have not.
    """

    name: str
    title: str
    question: str
    keys: tuple[str, ...]
    values: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    again: tuple[int, ...] = (100, 101, 102)
    fits_of: str = ""

    @abstractmethod
    def cells(self, quick: bool) -> Sequence[Cell]:
        """The cells of a run; with `quick`, few and small ones for a smoke run."""

    @abstractmethod
    def answer(self, found: Measurements) -> str:
        """The answer in one or two sentences, with figures taken from the measurements."""

    def notes(self, found: Measurements) -> Sequence[str]:
        """Details behind the answer, with figures taken from the measurements; by default none."""
        return ()

    @abstractmethod
    def tables(self, found: Measurements) -> Sequence[Part]:
        """The tables of the page."""

    @abstractmethod
    def figure(self, found: Measurements) -> Figure:
        """The figure of the page."""

    @property
    @abstractmethod
    def method(self) -> str:
        """How it was measured: models, numbers of samples, references; Markdown."""

    def claims(self, found: Measurements) -> Sequence[Claim]:
        """The verdicts on the paper's claims and open questions; by default none."""
        return ()
