"""The fitting batch in chunks: each runs its own samples through the growing plan, and rests on the host in between."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..ode import ProbabilityFlowODE
from ..plan import Tracer, Vector, evaluator, run_code
from ..plan.vectors import weight_mean_square
from .lstsq import LeastSquares
from .targets import Numeric, Samples
from .terms import StepRecord, Term

__all__ = ["Chunk", "StepSystem", "device_of"]


class Chunk:
    """Part of the fitting batch, with the vectors of its own run of the growing plan that are still needed, on the host.

    The model's device holds the vectors of one chunk at a time, however many there are.

    Parameters
    ----------
    samples : what runs.
    device : where.
    own : which of them the fit is about; the others only run along. All by default.
    """

    def __init__(self, samples: Samples, device: torch.device, own: slice | None = None) -> None:
        self.samples, self.device = samples, device
        self.own = slice(0, len(samples.initial)) if own is None else own
        self.own_samples = samples.part(self.own)
        self.values: dict[int, Tensor] = {0: samples.initial.cpu()}
        self._done = 0

    def _run(self, tracer: Tracer, values: dict[int, Tensor], samples: Samples) -> None:
        for _ in run_code(tracer.code, values, evaluator(samples.ode), start=self._done):
            pass

    def advance(self, tracer: Tracer, live: set[int]) -> None:
        """Run the instructions that were written since the last call, and forget every vector that is not in `live`."""
        needed = {j for instruction in tracer.code[self._done :] for j in instruction.reads}
        if needed:
            values = self._loaded(needed & self.values.keys())
            self._run(tracer, values, self.samples)
            self._store(values, tracer)
        self.values = {j: v for j, v in self.values.items() if j in live}

    def explore(self, tracer: Tracer, fork: Tracer) -> dict[int, Tensor]:
        """Advance, and go on along a fork of the trace with the own samples: their vectors, on the device, not kept."""
        values = self._loaded(self.values.keys())
        self._run(tracer, values, self.samples)
        self._store(values, tracer)
        own = {j: v[self.own] for j, v in values.items()}
        self._run(fork, own, self.own_samples)
        return own

    def _loaded(self, indices: Iterable[int]) -> dict[int, Tensor]:
        return {j: self.values[j].to(self.device) for j in indices}

    def _store(self, values: dict[int, Tensor], tracer: Tracer) -> None:
        self.values |= {j: v.cpu() for j, v in values.items() if j > self._done}
        self._done = len(tracer.code)


class StepSystem:
    """What a step is to be fitted on: its target and columns, on a fork of the trace that is run and thrown away."""

    def __init__(
        self, tracer: Tracer, fork: Tracer, record: StepRecord, candidates: tuple[Term, ...], aim: Vector | Numeric
    ) -> None:
        self.tracer, self.fork, self.aim, self.candidates = tracer, fork, aim, candidates
        self.columns = [fork.hold(term.direction) for term in candidates]
        self.start, self.result = fork.hold(record.x), fork.hold(record.base)
        self.end = fork.hold(aim) if isinstance(aim, Vector) else None
        parts = [term.direction.weights for term in candidates]
        self._sources = sorted({j for weights in parts for j in weights})

    def add(self, chunk: Chunk, train: LeastSquares, held: LeastSquares, cut: int) -> Tensor:
        """Add the first `cut` of a chunk's own samples to one system and the others to the other.

        Returns, of the first, the squared rounding error in each column and at last the squared size of the base's result,
        float64 [k + 1] on the host: each vector in a direction is exact to the precision of its dtype only.
        """
        values = chunk.explore(self.tracer, self.fork)
        if self.end is not None:
            wanted = _read(values, self.end)
        elif not isinstance(self.aim, Vector):
            wanted = self.aim(chunk.own_samples, _read(values, self.start))
        # In float64 before the difference: a residual is small against the states at high noise.
        result = _read(values, self.result).double()
        residual = wanted.double() - result
        columns = [_read(values, c) for c in self.columns]
        train.add([c[:cut] for c in columns], residual[:cut])
        held.add([c[cut:] for c in columns], residual[cut:])
        size = result[:cut].square().sum().cpu().reshape(1)
        return torch.cat([self._rounding(values, cut), size])

    def _rounding(self, values: dict[int, Tensor], cut: int) -> Tensor:
        plain = {j: values[j][:cut] for j in self._sources}
        if not plain:
            return torch.zeros(len(self.candidates), dtype=torch.float64, device="cpu")
        # One transfer: a number for each vector. Sums over samples would depend on the cut of the batch in the last bit.
        sizes = torch.stack([torch.linalg.vector_norm(v.double()) * torch.finfo(v.dtype).eps for v in plain.values()])
        size = dict(zip(plain, sizes.square().tolist(), strict=True))
        noise = [
            sum(weight_mean_square(w) * size[j] for j, w in term.direction.weights.items()) for term in self.candidates
        ]
        return torch.tensor(noise, dtype=torch.float64, device="cpu")


def _read(values: dict[int, Tensor], held: Vector) -> Tensor:
    (index,) = held.weights
    return values[index]


def device_of(ode: ProbabilityFlowODE, x: Tensor) -> torch.device:
    """Where the model runs: that of its parameters, else that of the states."""
    if isinstance(ode.model, nn.Module):
        for parameter in ode.model.parameters():
            return parameter.device
    return x.device
