"""The batch: samples for a fit or a measurement, with their ODE and their accurate trajectories."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..checks import check_number, check_whole
from ..errors import DuplicateWarning, InputError, warn
from ..files import bytes_of
from ..metrics import flat
from ..ode import ProbabilityFlowODE
from ..ode.conditions import digest_of
from ..ode.fingerprint import OF_ODE
from ..ode.origin import conditions_digest
from ..ode.wrapped import layers_of
from ..plan import Plan
from ..teacher.teacher import Teacher, slices

__all__ = ["Batch", "held_out_of", "per_sample"]


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples for a fit or a measurement.

    Attributes
    ----------
    ode : the ODE with the conditions of the samples.
    x : initial states [B, ...], float32 or float64, on any device.
    teacher : accurate trajectories of the samples, or None.
    chunk_size : number of samples per model call; None for all.
    final : true final states [B, ...] in the dtype of x, on any device; by default the final states of the teacher.
    signal : part alpha x_0 of the initial states, [B, ...], where they are images with noise; None for pure noise.

    Raises
    ------
    InputError : `chunk_size` is not a whole number from 1.
    """

    ode: ProbabilityFlowODE
    x: Tensor
    teacher: Teacher | None = None
    chunk_size: int | None = None
    final: Tensor | None = None
    signal: Tensor | None = None

    def __post_init__(self) -> None:
        if self.chunk_size is not None:
            check_whole("chunk_size", self.chunk_size, least=1)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: slice | Tensor) -> Batch:
        """A part of the batch: the samples of a slice or of an index tensor [n], integer or boolean."""
        teacher = None if self.teacher is None else self.teacher.subset(index)
        final, signal = (None if own is None else own[index] for own in (self.final, self.signal))
        ode = self.ode.subset(index, len(self.x))
        return replace(self, ode=ode, x=self.x[index], teacher=teacher, final=final, signal=signal)

    def chunks(self) -> Iterator[Batch]:
        """The batch in parts of `chunk_size`, in order."""
        return (self[part] for part in slices(len(self.x), self.chunk_size))

    def split(self, held_out: int) -> tuple[Batch, Batch]:
        """The training samples, and the last `held_out` samples."""
        train = len(self.x) - held_out
        return self[:train], self[train:]

    @property
    def device(self) -> torch.device:
        """Device of the model's parameters; device of the states for a model without parameters."""
        return self.ode.device or self.x.device

    @property
    def taught(self) -> Teacher:
        """The teacher.

        Raises
        ------
        InputError : the batch has no teacher.
        """
        if self.teacher is None:
            raise InputError("this batch has no teacher: make one with Teacher.solve(ode, x, t_start, t_end).")
        return self.teacher

    @property
    def target(self) -> Tensor:
        """True final states, [B, ...]."""
        return self.taught.final if self.final is None else self.final

    @torch.no_grad()
    def errors(self, plan: Plan) -> Tensor:
        """Root mean square error per component of the final state of each sample, float64 [B] on the host."""
        found = []
        for part in self.chunks():
            final = plan.run(part.ode, part.x, check_finite=False).cpu().double()
            found.append(per_sample(final - part.target.cpu().double()))
        return torch.cat(found)

    # ---- copies ------------------------------------------------------------------------------------------------------

    def distinct(self) -> Tensor:
        """Whether each sample is the first with its state, conditions, guidance scale and attributes of wrappers, bool [B]."""
        states = [hashlib.sha256(bytes_of(state)).digest() for state in self.x.cpu()]
        if len(set(states)) == len(states):
            return torch.ones(len(states), dtype=torch.bool, device="cpu")
        conditions = [_own_digest(self.ode, slice(i, i + 1), len(self.x)) for i in range(len(self.x))]
        first: dict[object, int] = {}
        for i, key in enumerate(zip(states, conditions, strict=True)):
            first.setdefault(key, i)
        found = torch.zeros(len(states), dtype=torch.bool, device="cpu")
        found[list(first.values())] = True
        return found

    def without_copies(self) -> Batch:
        """The batch without copies of earlier samples; a DuplicateWarning has the number of copies.

        A held-out copy of a training sample would favor the fit.
        """
        own = self.distinct().nonzero()[:, 0]
        if len(own) == len(self.x):
            return self
        warn(
            f"{len(self.x) - len(own)} of {len(self.x)} draws of noise repeat others under the same conditions, and are left "
            "out: copies of training samples cannot judge a fit. Give draws that differ.",
            DuplicateWarning,
        )
        return self[own]


def _own_digest(ode: ProbabilityFlowODE, index: slice, batch: int) -> str:
    """A hash of all that an ODE has for some samples alone: conditions, guidance scale, and tensors that `subset` indexes."""
    part = ode.subset(index, batch)
    layers = zip(layers_of(ode), layers_of(part), strict=True)
    own = [
        {k: v for k, v in vars(b).items() if isinstance(v, Tensor) and v is not vars(a).get(k) and k not in OF_ODE}
        for a, b in layers
    ]
    return conditions_digest(part) + digest_of(*own)


def per_sample(difference: Tensor) -> Tensor:
    """Root mean square of each sample of [B, ...], [B]."""
    return flat(difference).square().mean(dim=1).sqrt()


def held_out_of(draws: int, share: float) -> int:
    """Number of held-out draws for a share between 0 and 1: at least 1, and at most `draws` - 1."""
    check_number("held_out", share, above=0, below=1)
    return min(max(1, round(share * draws)), draws - 1)
