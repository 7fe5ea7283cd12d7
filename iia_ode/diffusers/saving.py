"""The files of a scheduler: its solvers beside ``scheduler_config.json``, each in a file of this library's own format.

The names end in ``.iia``: with any ``.safetensors`` file in the folder of the scheduler, a download of the pipeline would
leave out the weights of the networks.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import diffusers
from diffusers.configuration_utils import ConfigMixin, FrozenDict
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from huggingface_hub import hf_hub_download
from torch import Tensor

from ..errors import FileFormatError, InputError
from ..files import write_bytes
from ..loading import load
from ..solvers import Solver
from .choice import Choice, Fixed, chosen
from .timesteps import Order
from .translation import prediction_of, schedule_of

__all__ = ["KEY", "Saved", "described", "frozen", "register"]

KEY = "_iia_ode"
"""Entry of the configuration; other schedulers pass over entries that begin with an underscore."""

frozen: Any = FrozenDict
_NAME = "solver.iia"
_FORMAT = 1
_DOWNLOAD = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


def register(module: str) -> None:
    """Enter a module among the libraries from which diffusers loads schedulers.

    Without the entry, a pipeline with a scheduler of this library could be loaded from a folder, but not from the hub.
    """
    LOADABLE_CLASSES[module] = {"SchedulerMixin": ["save_pretrained", "from_pretrained"]}


def described(choice: Choice, base: Any, whole_timesteps: bool) -> dict[str, Any]:
    """The entry of a scheduler's configuration: names and options, and no weights."""
    return {
        "format": _FORMAT,
        "scheduler": type(base).__name__,
        "solver": _options(choice.classic),
        "files": [name for name, _ in _files(choice)],
        "otherwise": _options(choice.otherwise),
        "whole_timesteps": whole_timesteps,
    }


def _options(solver: Solver | None) -> dict[str, Any] | None:
    return None if solver is None else {"name": solver.name, "options": solver.options()}


def _files(choice: Choice) -> list[tuple[str, Fixed]]:
    """The fitted solvers and plans with the names of their files."""
    if len(choice.fixed) == 1:
        return [(_NAME, solver) for solver in choice.fixed.values()]
    return [(f"solver-{n}.iia", solver) for n, solver in sorted(choice.fixed.items())]


def _base_of(config: Any, changes: dict[str, Any]) -> Any:
    """The replaced scheduler, from a configuration with the entry of :func:`described`, with other entries in `changes`.

    Raises
    ------
    FileFormatError : the entry is missing or damaged, of a newer version, or names no scheduler of diffusers.
    """
    own = config.get(KEY)
    if not isinstance(own, dict) or not isinstance(own.get("scheduler"), str):
        raise FileFormatError(
            "this configuration names no solver: make the scheduler by IIAScheduler.of(solver, pipe.scheduler), or load a "
            "saved one by IIAScheduler.from_pretrained(folder)."
        )
    if own.get("format") != _FORMAT:
        raise FileFormatError(
            f"this scheduler has format version {own.get('format')}, and this iia_ode reads {_FORMAT}: upgrade iia_ode."
        )
    kind = getattr(diffusers, own["scheduler"], None)
    if kind is None:
        raise FileFormatError(
            f"diffusers {diffusers.__version__} has no {own['scheduler']}, whose configuration this is."
        )
    return kind.from_config(
        {**{k: v for k, v in config.items() if k != KEY}, "_class_name": own["scheduler"]}, **changes
    )


def _choice_of(config: Any, base: Any, find: Callable[[str], str]) -> tuple[Choice, Any, bool]:
    """The solvers of a configuration, its scheduler, and whether timesteps are whole; `find` maps a name to a path.

    Raises
    ------
    FileFormatError : the entry or a file is damaged.
    MismatchError : a file is for another scheduler.
    """
    own = config[KEY]
    try:
        names, classic = own["files"], own["solver"]
        solver = [load(find(name)) for name in names] if classic is None else classic
        choice = chosen(solver, schedule_of(base), prediction_of(base), own["otherwise"])
        return choice, base, bool(own["whole_timesteps"])
    except (KeyError, TypeError) as error:
        raise FileFormatError(f"the entry {KEY!r} of this scheduler's configuration is damaged: {error!r}.") from error


def _find(name: str, source: str | os.PathLike[str], subfolder: str | None, options: dict[str, Any]) -> str:
    """The path of a file in a folder, or in a repository of the hub."""
    if os.path.basename(name) != name:
        raise FileFormatError(f"a scheduler has its solvers in its own folder, and {name!r} is elsewhere.")
    if os.path.isdir(source):
        return os.path.join(source, subfolder or "", name)
    return str(hf_hub_download(str(source), filename=name, subfolder=subfolder, **options))


class Saved(SchedulerMixin, ConfigMixin):  # type: ignore[misc]  # the bases declare config_name differently
    """The files and copies of a scheduler: how diffusers saves, uploads, loads and copies it."""

    _choice: Choice
    _internal_dict: Any
    _order: Order
    timesteps: Tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy that shares the plans and the solvers, which never change."""
        twin = copy.copy(self)
        memo[id(self)] = twin
        for name in ("timesteps", "sigmas", "replaced", "_internal_dict", "_run"):
            setattr(twin, name, copy.deepcopy(getattr(self, name), memo))
        twin._order = Order(twin.timesteps, self._order.values)
        return twin

    def save_config(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write the solvers, and the configuration beside them; ``save_pretrained`` and ``push_to_hub`` call this method."""
        for name, solver in _files(self._choice):
            solver.save(Path(save_directory) / name)
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    def to_json_string(self) -> str:
        """The configuration as JSON."""
        twin = copy.copy(self)
        twin._internal_dict = frozen(self._internal_dict)  # the method of the base class writes to it
        return str(ConfigMixin.to_json_string(twin))

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write the configuration, atomically."""
        write_bytes(json_file_path, self.to_json_string().encode())

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None = None,
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Read a saved scheduler with its solvers, from a folder or from a repository of the hub.

        Parameters
        ----------
        pretrained_model_name_or_path, subfolder : the folder, or ``"owner/name"``, and a folder inside.
        return_unused_kwargs : whether to return a pair with the options without effect.
        kwargs : options of a download, such as ``revision``, and entries of the configuration in place of the saved ones.

        Returns
        -------
        The scheduler.

        Raises
        ------
        FileFormatError : the configuration names no solver, or a file is damaged.
        """
        if pretrained_model_name_or_path is None:
            raise InputError("from_pretrained takes a folder, or the name of a repository such as 'owner/name'.")
        options = {k: v for k, v in kwargs.items() if k in _DOWNLOAD}
        config: Any = cls.load_config(pretrained_model_name_or_path, subfolder=subfolder, **options)
        changes = {k: v for k, v in kwargs.items() if k in config and k not in options}
        find = partial(_find, source=pretrained_model_name_or_path, subfolder=subfolder, options=options)
        made, used = cls._of_config(config, find, changes), {*options, *changes}
        return (made, {k: v for k, v in kwargs.items() if k not in used}) if return_unused_kwargs else made

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Make the scheduler of a configuration that names a classic solver.

        Parameters
        ----------
        config : a configuration of this class.
        return_unused_kwargs : whether to return a pair with the options without effect.
        kwargs : entries in place of those of the configuration, such as ``timestep_spacing``.

        Returns
        -------
        The scheduler.

        Raises
        ------
        FileFormatError : a configuration of another scheduler, or of a fitted solver, which is in a file.
        InputError : the configuration has no such entry.
        """
        unused = {k: v for k, v in kwargs.items() if k not in (config or {})}
        if unused and not return_unused_kwargs:
            raise InputError(
                f"the configuration of this scheduler has no {next(iter(unused))!r}: {', '.join(config or {})}."
            )

        def find(name: str) -> str:
            raise FileFormatError(f"this configuration needs its file {name!r}: load both by from_pretrained(folder).")

        made = cls._of_config(config, find, {k: v for k, v in kwargs.items() if k not in unused})
        return (made, unused) if return_unused_kwargs else made

    @classmethod
    def _of_config(cls, config: Any, find: Callable[[str], str], changes: dict[str, Any]) -> Any:
        base, made = _base_of(config, changes), cast("Any", cls)
        return made(*_choice_of(config, base, find))
