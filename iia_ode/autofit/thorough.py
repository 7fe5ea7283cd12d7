"""Parts of a search with budget ``"thorough"``: added draws, warm starts, and fresh draws for the final choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import IIAError, NonFiniteError, RankError, first_line
from ..iia.batch import Batch, held_out_of
from ..iia.provenance import Ingredient
from ..ode import ProbabilityFlowODE
from ..ode.conditions import named
from ..teacher import Integration
from ..warm_starts import estimate_moments
from .grids import LeapGrid
from .pipeline import Contender, Start
from .stages import Context, closed_form

__all__ = ["class_condition", "ends_of", "fresh_states", "judged", "more_states", "starts_of", "warm_started"]

_OWN = 0x9E3779B9  # seed offset of added draws, so that it does not overlap small user seeds
_FRESH = 0x7F4A7C15  # seed offset of the draws for the final choice
_LARGEST = 4096  # components of a sample, above which no covariance is estimated


# ---- draws -----------------------------------------------------------------------------------------------------------


def more_states(batch: Batch, t: float, draws: int, held_out: float, seed: int) -> Batch:
    """Extend the batch to `draws` samples: each given sample is followed by new samples under the same condition.

    New samples of images with noise are the same images with new noise.

    Held-out samples stay held out with their conditions, and each half of the training samples keeps its conditions.

    Parameters
    ----------
    batch : the given samples, at time t.
    t, seed : time and seed of the new noise.
    draws : number of samples of the result, at least the size of the batch.
    held_out : share of held-out samples.
    """
    ode, x = batch.ode, batch.x
    held, own = held_out_of(draws, held_out), held_out_of(len(x), held_out)
    index = torch.cat([_in_turn(draws - held, len(x) - own), len(x) - own + _in_turn(held, own)])
    new = torch.cat([torch.zeros(1, dtype=torch.bool, device="cpu"), index[1:] == index[:-1]])
    states, signal = x.cpu()[index], None if batch.signal is None else batch.signal.cpu()[index]
    states[new] = _drawn(ode, x, t, int(new.sum()), _OWN + seed) + (0 if signal is None else signal[new])
    return replace(batch, ode=ode.subset(index, len(x)), x=states.to(x.device), signal=signal)


def fresh_states(batch: Batch, t: float, draws: int, first: int, seed: int) -> Batch:
    """`draws` samples of new noise at time t, under the conditions of the samples from `first` on in turn."""
    ode, x = batch.ode, batch.x
    index = first + _in_turn(draws, len(x) - first)
    new = _drawn(ode, x, t, draws, _FRESH + seed).to(x.device)
    if batch.signal is not None:
        new = new + batch.signal[index.to(batch.signal.device)].to(new)
    return Batch(ode.subset(index, len(x)), new, None, batch.chunk_size)


def ends_of(batch: Batch, t: float, steps: int, progress: bool, *, sigma_min: float, data_size: float) -> Tensor:
    """True final states [B, ...] of samples at time t, by the integration of a teacher."""
    end = batch.ode.schedule.t_data
    made = Integration.of(batch.ode, batch.x, t, end, steps=steps, sigma_min=sigma_min, size=data_size)
    parts = tqdm(list(batch.chunks()), desc="ends", disable=not progress)
    finals = torch.cat([made.end(part.ode, part.x).cpu() for part in parts])
    if not bool(torch.isfinite(finals).all()):
        raise NonFiniteError(
            "a trajectory ended in NaN or infinity: check the model over the whole range of noise levels."
        )
    return finals


def _drawn(ode: ProbabilityFlowODE, x: Tensor, t: float, draws: int, seed: int) -> Tensor:
    """Gaussian noise of standard deviation sigma(t), like x, on the host."""
    generator = torch.Generator("cpu").manual_seed(seed % 2**32)  # larger seeds would lose their high bits silently
    return ode.schedule.sigma(t) * torch.randn((draws, *x.shape[1:]), generator=generator, dtype=x.dtype, device="cpu")


def _in_turn(n: int, own: int) -> Tensor:
    """Each of 0 ... own - 1 about n / own times, in order, int64 [n]."""
    return torch.arange(n, device="cpu") * own // n


# ---- warm starts -----------------------------------------------------------------------------------------------------


def starts_of(train: Batch, all_values: ProbabilityFlowODE, say: Callable[[str], None]) -> list[Start]:
    """The kinds of warm start: a single gain, a gain per direction of the data, and gains with a constant per class.

    Parameters
    ----------
    train : the training samples with their teacher.
    all_values : the ODE with the conditions of all samples, held-out samples included.
    say : logs the reason for a missing kind.
    """
    key = class_condition(train, all_values)
    labels = None if key is None else dict(named(train.ode.conditioning))[key].cpu()
    starts = [Start("affine", train)]
    if train.target[0].numel() <= _LARGEST:
        try:
            starts.append(Start("diagonal", train, estimate_moments(train.target)))
            if key is not None:
                moments = estimate_moments(train.target, labels=labels, key=key)
                starts.append(Start("diagonal, per " + key, train, moments, key, labels))
        except IIAError as error:
            say(f"no covariance of the data: {first_line(error)}")
    return starts


def class_condition(train: Batch, all_values: ProbabilityFlowODE) -> str | None:
    """The name of an integer condition with at least eight training samples for each value; None without any."""
    known_values = dict(named(all_values.conditioning))
    for key, value in named(train.ode.conditioning):
        if isinstance(value, Tensor) and value.ndim == 1 and len(value) == len(train) and not value.is_floating_point():
            _, counts = torch.unique(value, return_counts=True)
            known = bool(torch.isin(known_values[key], value).all())
            if len(counts) > 1 and bool((counts >= 8).all()) and known:
                return key
    return None


def warm_started(context: Context, cold: LeapGrid | None) -> list[Contender | Ingredient]:
    """Closed-form fits for each kind of warm start, on grids near the leap grid of the cold start.

    A failed warm start becomes an ingredient without an error.
    """
    cold, scale = cold or LeapGrid(context.scale, 0.1 * context.scale), context.scale
    lasts = (cold.sigma_min, cold.sigma_min / 2)
    near = [LeapGrid(scale * f, last, cold.rho) for f in (2.0, 3.5, 6.0, 10.0, 16.0, 28.0) for last in lasts]
    made: list[Contender | Ingredient] = []
    for start in starts_of(context.train, context.batch.ode, context.say):
        with context.stage() as cost:
            try:
                made += closed_form(context, start, near)
                continue
            except RankError:
                raise
            except IIAError as error:
                context.say(f"warm start {start.name}: not possible here ({first_line(error)})")
        made.append(Ingredient(f"warm start {start.name}", None, cost.sample_evaluations, cost.seconds))
    return made


def judged(context: Context, contenders: list[Contender], fresh: Batch) -> list[Contender] | None:
    """The contenders with errors on the fresh samples too; None where no error on the fresh samples is finite."""
    found = [c.judged(fresh.errors(c.plan)) for c in contenders]
    if all(c.error is None for c in found):
        context.say(f"nothing is finite on {len(fresh)} fresh draws: the choice is made without them")
        return None
    for contender in found:
        context.say(f"{contender}, with {len(fresh)} fresh draws")
    return found
