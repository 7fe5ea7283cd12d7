"""The arguments of a pipeline's call: arguments with an entry per prompt, and arguments that all samples share."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.callbacks import PipelineCallback
from torch import Tensor

from ..errors import InputError, MismatchWarning, warn

__all__ = ["arguments", "count_of", "picked"]

_NO_EFFECT = {
    *("num_inference_steps", "timesteps", "sigmas", "latents", "strength", "output_type", "return_dict"),
    *("callback", "callback_steps", "callback_on_step_end", "callback_on_step_end_tensor_inputs"),
}
"""Arguments of a call that do not change the model."""
_PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")
_TEXTS = ("prompt", "negative_prompt")
_COUNTS = (*_TEXTS, "class_labels", "prompt_embeds", "negative_prompt_embeds", "image_embeds", "image")
"""Arguments whose length is the number of prompts; the first given argument counts."""


_PER_NETWORK = re.compile(r"(control|ip_adapter|adapter|cross_attention|joint_attention|attention).*|.*_scales?")
"""Arguments whose entries belong to adapters, not to prompts."""
_BY_STEP = re.compile(
    r".*_guidance_(start|end|stop)|cfg_interval_(start|end)|cfg_trunc_ratio|guidance_schedule|use_dynamic_cfg"
    r"|skip_guidance_layers|num_temporal_reasoning_steps|mixed_precision_(first|last)_steps"
)
"""Arguments that change a network or its guidance by the index of the step."""
_CALLBACKS = ("callback_on_step_end", "callback")


class Rows(list[Any]):
    """A list with an entry per sample, which a condition treats as a single value."""


def arguments(pipe: Any, call: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], int | None]:
    """Split the arguments of a call by prompts.

    Returns
    -------
    The arguments with an entry per prompt, the arguments that all samples share, and the number of images per prompt (None if
    not given).

    Raises
    ------
    InputError : the call of the pipeline has no such argument.

    Warns
    -----
    MismatchWarning : an argument changes the model by the index of the step.
    """
    known = inspect.signature(type(pipe).__call__).parameters
    unknown = sorted(set(call) - set(known))
    if unknown:
        raise InputError(
            f"the call of {type(pipe).__name__} has no {unknown[0]!r}: its arguments are {', '.join(known)}."
        )
    _check_steps(call, known)
    if isinstance(call.get("generator"), list):
        raise InputError(
            "a list of generators is for one number of samples, and an ODE serves any: give one generator, whose draws every "
            "evaluation repeats."
        )
    used = {k: v for k, v in call.items() if k not in _NO_EFFECT}
    repeats = [used.pop(name) for name in _PER_PROMPT if name in used]
    takes_count = any(name in known for name in (*_PER_PROMPT, "batch_size"))
    if not takes_count:  # the pipeline draws a single sample per prompt
        used |= {k: [v] for k, v in used.items() if k in _TEXTS and isinstance(v, str)}
    several = len(getattr(getattr(pipe, "controlnet", None), "nets", ())) > 1  # an image for each network
    rows, shared = _split(used, 2 if takes_count else 1, ("generator", *(("image",) * several)))
    return rows, shared, repeats[0] if repeats and rows else None


def _check_steps(call: Mapping[str, Any], known: Mapping[str, inspect.Parameter]) -> None:
    """Warn once if arguments change the model by the index of the step."""
    found = [k for k, v in call.items() if _BY_STEP.fullmatch(k) and not _is_same(v, known[k].default)]
    for name in _CALLBACKS:
        own = getattr(call.get(name), "callbacks", [call.get(name)])
        if any(isinstance(callback, PipelineCallback) for callback in own):
            found.append(name)
    if found:
        shown = ", ".join(f"{k}={call[k]}" if k not in _CALLBACKS else k for k in found)
        warn(
            f"{shown} changes the model by the index of the step, and the ODE has one model for all steps, the model of the "
            f"first step. The pipeline's own run differs: omit {', '.join(found)}.",
            MismatchWarning,
        )


def _is_same(value: Any, default: Any) -> bool:
    """Whether a value is the default; arrays are no defaults."""
    return value is default or (not hasattr(value, "shape") and bool(value == default))


def _split(call: Mapping[str, Any], least: int, whole: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments with an entry per prompt, and the others. With fewer than `least` prompts, all are shared.

    The arguments `whole`, and the arguments of adapters, have no entry per prompt.
    """
    lengths = (_length(name, call[name]) for name in _COUNTS if name in call and name not in whole)
    count = next((n for n in lengths if n is not None), None)
    if count is None or count < least:
        return {}, dict(call)
    own = (k for k in call if k not in whole and not _PER_NETWORK.fullmatch(k))
    rows = {k: _entries(k, call[k]) for k in own if _length(k, call[k]) == count}
    return rows, {k: v for k, v in call.items() if k not in rows}


def _length(name: str, value: Any) -> int | None:
    """Number of entries of an argument; None for a single value, such as one image [C, H, W]."""
    if isinstance(value, Tensor):
        return len(value) if value.ndim > (3 if "image" in name and "embeds" not in name else 0) else None
    return len(value) if isinstance(value, list) else None


def _entries(name: str, value: Any) -> Any:
    if name == "class_labels":
        return torch.as_tensor(value)
    return value if isinstance(value, Tensor) or all(isinstance(v, str) for v in value) else Rows(value)


def count_of(rows: Mapping[str, Any]) -> int | None:
    """The number of prompts; None where all samples share the arguments."""
    return next((len(v) for v in rows.values()), None)


def picked(value: Any, index: list[int]) -> Any:
    """The entries of an argument at the given indices of prompts."""
    return value[index] if isinstance(value, Tensor) else type(value)(value[i] for i in index)
