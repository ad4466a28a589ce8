"""Where ops are registered with torch: in a namespace that follows this package's name.

A copy of the package under another name, vendored into another library, has ops of its own. A module that is imported
again or reloaded replaces its ops."""

from __future__ import annotations

from typing import Any

import torch

try:
    from torch.utils.flop_counter import register_flop_formula
except Exception:  # torch's counter imports triton, which may be broken

    def register_flop_formula(targets: Any, get_raw: Any = False) -> Any:  # type: ignore[misc]  # replaces torch's
        return lambda formula: formula


NAMESPACE = str(__package__).replace(".", "__")
# Ops are looked up here in each call: a function from before a reload then runs the op from after it.
OPS = getattr(torch.ops, NAMESPACE)
_libraries: dict[str, Any] = vars(OPS).setdefault("_libraries", {})  # outlives this module


def library(op: str) -> torch.library.Library:
    """The torch library to register `op` and its backward in (`lib=`). Earlier registrations of `op` are removed."""
    if op in _libraries:
        _libraries[op]._destroy()
    _libraries[op] = torch.library.Library(NAMESPACE, "FRAGMENT")
    return _libraries[op]
