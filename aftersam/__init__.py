"""AFTer-SAM: segment organs in CT with SAM, LoRA and attention across neighbouring slices."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["AfterSAM", "PredictOptions", "Scan", "Segmenter", "build_aftersam", "load", "predict_volume"]

_HOME = {
    "AfterSAM": "aftersam.model.aftersam",
    "PredictOptions": "aftersam.inference.inputs",
    "Scan": "aftersam.inference.inputs",
    "Segmenter": "aftersam.inference.segmenter",
    "build_aftersam": "aftersam.model.build",
    "load": "aftersam.inference.segmenter",
    "predict_volume": "aftersam.inference.sliding",
}


def __getattr__(name: str) -> Any:
    """Import on first use: a command's --help must not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'aftersam' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
