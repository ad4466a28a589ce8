"""The modules of segment_anything that SAM is made of, without its predictor.

Source: github.com/facebookresearch/segment-anything."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

_PRIVATE_NAME = "aftersam.model._segment_anything"


@cache
def segment_anything_modeling(module: str) -> ModuleType:
    """segment_anything.modeling.`module`, loaded under a private name.

    segment_anything/__init__ is not run: it imports torchvision for the predictor, which is not used here."""
    if _PRIVATE_NAME not in sys.modules:
        found = importlib.util.find_spec("segment_anything")
        if found is None or found.origin is None:
            raise ImportError("segment-anything is not installed; pip install segment-anything")
        folder = Path(found.origin).parent / "modeling"
        spec = importlib.util.spec_from_file_location(
            _PRIVATE_NAME, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None
        assert spec.loader is not None
        package = importlib.util.module_from_spec(spec)
        sys.modules[_PRIVATE_NAME] = package
        spec.loader.exec_module(package)
    return importlib.import_module(f"{_PRIVATE_NAME}.{module}")
