"""Autocast, asked in a way that holds on the meta device too, which has none."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Data type that autocast gives to matrix products on this device now; None: it is off."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A block in which data types stay as they are."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
