"""The networks of a pipeline, compared with the networks of a fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import nn

from ..errors import FingerprintWarning, InputError, warn
from ..iia.fitted import FittedSolver
from ..ode.fingerprint import Fingerprint, fingerprint_of

__all__ = ["check_networks", "networks_of", "scheduler_of"]

_NO_DENOISERS = ("vae", "text_encoder", "image_encoder", "safety", "movq", "vqgan", "vqvae", "vocoder")


def networks_of(pipe: Any) -> dict[str, nn.Module]:
    """The networks of a pipeline by name, without encoders and decoders of images and texts."""
    parts = ((k, v) for k, v in pipe.components.items() if isinstance(v, nn.Module))
    return {k: v for k, v in parts if not k.startswith(_NO_DENOISERS)}


def scheduler_of(found: Any) -> Any:
    """The scheduler of a pipeline, or the scheduler itself.

    Raises
    ------
    InputError : neither a pipeline nor a scheduler of diffusers.
    """
    scheduler = getattr(found, "scheduler", None) if isinstance(found, DiffusionPipeline) else found
    if not isinstance(scheduler, SchedulerMixin):
        raise InputError(
            f"the second argument is the pipeline, or the scheduler to be replaced, such as pipe.scheduler, got "
            f"{type(found).__name__}."
        )
    return scheduler


def check_networks(solvers: Iterable[object], pipe: Any) -> None:
    """Warn if fitted solvers were made for other networks than those of a pipeline; a scheduler has no networks.

    A fit to the ODE of a pipeline has the fingerprint of all networks together. A fit to a network has the fingerprint of the
    network.

    Warns
    -----
    FingerprintWarning : a fit was made for a network that the pipeline does not have.
    """
    if not isinstance(pipe, DiffusionPipeline):
        return
    known: list[Fingerprint] | None = None
    for solver in solvers:
        if not isinstance(solver, FittedSolver):
            continue
        own = Fingerprint(solver.record.origin.fingerprint)
        if not own.known or own.startswith("tag"):
            continue
        known = list(_fingerprints(pipe)) if known is None else known
        if Fingerprint(own.partition("+")[0]) not in known:
            warn(
                f"{solver.name} was fitted to a network with fingerprint {own}, and this {type(pipe).__name__} has "
                f"{', '.join(known)} ({', '.join(networks_of(pipe))}): fit for this pipeline, or load the weights of the fit.",
                FingerprintWarning,
            )


def _fingerprints(pipe: Any) -> Iterator[Fingerprint]:
    """The fingerprint of all networks together, and of each network."""
    networks = networks_of(pipe)
    yield fingerprint_of(nn.ModuleDict(networks))
    if len(networks) > 1:
        yield from map(fingerprint_of, networks.values())
