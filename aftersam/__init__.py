"""AFTer-SAM: segment organs in CT with SAM, LoRA and attention across neighbouring slices."""

from __future__ import annotations

from typing import Any

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
    if name == "__version__":
        return _version()
    if name not in _HOME:
        raise AttributeError(f"module 'aftersam' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)


def _version() -> str:
    """The version of both packages, from axial_fusion's file VERSION: importing axial_fusion would import torch."""
    from importlib.util import find_spec
    from pathlib import Path

    spec = find_spec("axial_fusion")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).with_name("VERSION").read_text(encoding="utf-8").strip()
