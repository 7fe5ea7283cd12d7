"""Train mode: modules whose output depends on the mode, and the warning about these modules."""

from __future__ import annotations

import dis
import re
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from ..errors import TrainModeWarning, warn_once
from .base import ProbabilityFlowODE
from .fingerprint import Parts

__all__ = ["check_mode", "in_training"]

_SHOWN = 3  # modules that a warning names
_KNOWN = ("torch", "builtins", "abc", "typing", "iia_ode")  # packages whose modules are told by their kind
_IDLE = {"NOP", "CACHE", "TO_BOOL", "EXTENDED_ARG", "COPY"}  # instructions that other versions of Python put between
_SETTERS = ("train", "eval", "__init__")


def check_mode(ode: ProbabilityFlowODE) -> None:
    """Warn if the model has a module in train mode whose output depends on the mode.

    Inside :func:`~iia_ode.errors.one_run`, the warning is issued once.

    Warns
    -----
    TrainModeWarning : for example, Dropout is on, or BatchNorm uses batch statistics and updates its running statistics.
    """
    if torch.compiler.is_compiling():
        return
    found = in_training(ode)
    if found:
        shown = ", ".join(found[:_SHOWN]) + (", ..." if len(found) > _SHOWN else "")
        warn_once(
            f"the model is in train mode: {len(found)} of its modules ({shown}) are random, or depend on the batch and change "
            "in use. Call model.eval() first.",
            TrainModeWarning,
        )


def in_training(ode: ProbabilityFlowODE) -> list[str]:
    """The modules in train mode whose output depends on the mode, as text: kind and name."""
    parts = Parts()
    if not isinstance(ode.model, nn.Module):
        parts.add(ode.model, "")
    found: dict[int, str] = {}
    for root in (ode, *parts.modules):
        for name, module in root.named_modules():
            if module.training and id(module) not in found and _depends(module):
                place = re.sub(r"^(inner\.)*(model\.)?", "", name)
                found[id(module)] = f"{type(module).__name__} {place}".strip()
    return list(found.values())


def _depends(module: nn.Module) -> bool:
    """Whether a module's own output depends on its mode."""
    if isinstance(module, torch.jit.ScriptModule):  # the original class is known by name only
        return module.original_name.startswith(
            ("Dropout", "AlphaDropout", "FeatureAlphaDropout", "BatchNorm", "SyncBatchNorm")
        )
    if type(module).__name__ == "_SpectralNorm":  # a step of power iteration at each call
        return True
    match module:
        case _DropoutNd():
            return module.p > 0
        case _NormBase():
            return module.running_mean is not None
        case nn.RReLU():
            return bool(module.lower != module.upper)
        case nn.MultiheadAttention() | nn.RNNBase():
            return module.dropout > 0
    kind: Any = type(module)
    return _reads_mode(kind)


@lru_cache(maxsize=1024)
def _reads_mode(kind: Any) -> bool:
    """Whether a method of a class outside of torch and of this library reads the mode, other than to set it."""
    foreign = (base for base in kind.__mro__ if base.__module__.split(".")[0] not in _KNOWN)
    return any(
        _uses_mode(value.__code__)
        for base in foreign
        for name, value in vars(base).items()
        if isinstance(value, FunctionType) and name not in _SETTERS
    )


def _uses_mode(code: CodeType) -> bool:
    """Whether code reads the mode, other than together with a flag of gradient checkpointing, which changes no output."""
    if "training" not in code.co_names:
        return False
    steps = [ins for ins in dis.get_instructions(code) if ins.opname not in _IDLE]
    return any(
        ins.argval == "training" and ins.opname == "LOAD_ATTR" and not _is_checkpointing(steps, k)
        for k, ins in enumerate(steps)
    )


def _is_checkpointing(steps: list[dis.Instruction], k: int) -> bool:
    """Whether instruction k reads the mode in ``training and flag`` or ``flag and training``, with a flag of checkpointing."""
    for flag in (k - 3, k + 3):  # a jump and the object stand between the two attributes
        if 0 <= flag < len(steps) and steps[flag].opname == "LOAD_ATTR" and "checkpoint" in str(steps[flag].argval):
            return "IF_FALSE" in steps[min(k, flag) + 1].opname
    return False
