"""Checks of user input that several public entries share. Each says what was expected, what arrived and the fix."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor


def as_float_tensor(value: ArrayLike | Tensor, name: str, like: Tensor | None = None) -> Tensor:
    """Return `value` as a finite floating tensor; what is no tensor yet takes the dtype and device of `like`.

    Raises:
        TypeError: not numeric, or complex, or a tensor of another dtype than `like`.
        ValueError: holds NaN or inf.
    """
    if isinstance(value, Tensor):
        tensor = value
        if tensor.is_complex():
            raise TypeError(f"{name} must be real; got {value.dtype}.")
        if not tensor.is_floating_point():
            tensor = tensor.to(like.dtype if like is not None else torch.get_default_dtype())
        if like is not None and tensor.ndim and tensor.dtype != like.dtype:
            raise TypeError(f"{name} must have the weights' dtype {like.dtype}; got {tensor.dtype}. Convert one.")
    else:
        try:
            array = np.asarray(value)
        except ValueError as error:
            raise TypeError(f"{name} must be an array of numbers; got {type(value).__name__}.") from error
        if array.dtype.kind not in "fiub":
            raise TypeError(f"{name} must be an array of real numbers; got {type(value).__name__} ({array.dtype}).")
        tensor = torch.as_tensor(array, dtype=None if array.dtype.kind == "f" else torch.get_default_dtype())
        tensor = tensor.to(like.dtype if like is not None else tensor.dtype)
    if like is not None:
        tensor = tensor.to(like.device, like.dtype)
    if not math.isfinite(float(tensor.detach().sum())) and not bool(torch.isfinite(tensor.detach()).all()):
        count = int((~torch.isfinite(tensor.detach())).sum())
        raise ValueError(f"{name} must be finite; got {count} NaN or infinite values of {tensor.numel()}.")
    return tensor


def check_square(shape: Sequence[int], name: str = "weights") -> None:
    """Raise ValueError unless the last two axes are a square (post, pre) matrix."""
    if len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] == 0:
        raise ValueError(f"{name} must be square (..., post, pre); got {tuple(shape)}.")


def check_time_step(dt: float, tau: float | None = None) -> float:
    """Return dt as a float; warns where explicit Euler with this step is unsound (dt > tau).

    Raises:
        TypeError: dt is not a number.
        ValueError: dt is not positive and finite.
    """
    if isinstance(dt, bool) or not isinstance(dt, int | float | np.number | Tensor):
        raise TypeError(f"dt must be a number; got {type(dt).__name__}.")
    if not (float(dt) > 0 and math.isfinite(dt)):
        raise ValueError(f"dt must be positive and finite; got {float(dt)}.")
    if tau is not None and float(dt) > tau:
        warnings.warn(
            f"dt = {float(dt)} is larger than tau = {tau}: Euler's decay factor 1 - dt/tau is negative and the "
            "solution oscillates; use dt of about tau/10.",
            stacklevel=3,
        )
    return float(dt)


def check_count(value: int, name: str, minimum: int = 1) -> int:
    """Return `value` as an int.

    Raises:
        TypeError: not an integer.
        ValueError: smaller than `minimum`.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer; got {value!r}.")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}; got {value}.")
    return int(value)


def check_positive(value: float, name: str, *, zero_ok: bool = False) -> float:
    """Return `value` as a float.

    Raises:
        TypeError: not a number.
        ValueError: not finite, negative, or zero where zero is not allowed.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | np.number | Tensor):
        raise TypeError(f"{name} must be a number; got {type(value).__name__}.")
    number = float(value)
    if not math.isfinite(number) or number < 0 or (number == 0 and not zero_ok):
        raise ValueError(f"{name} must be {'non-negative' if zero_ok else 'positive'} and finite; got {number}.")
    return number


def optional_package(name: str, extra: str) -> ModuleType:
    """Import a package that only this extra of neurosde brings.

    Raises:
        ImportError: it is not installed; the message says how it is.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} is needed for this and not installed; pip install 'neurosde[{extra}]'") from error
