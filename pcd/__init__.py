"""pcd: train and compare depth heads on frozen encoders, from a cache that is written once.

The Python interface is that of the stages: `load_recipe`, `extract`, `open_cache`, `train`, `open_run`, `evaluate`,
`report`, `Predictor` and `run_recipe`. Names are imported when they are first used, so that `import pcd` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pcd.cache.store import open_cache
    from pcd.recipe_files import load_recipe
    from pcd.stages.evaluate import evaluate
    from pcd.stages.extract import extract
    from pcd.stages.predict import Predictor
    from pcd.stages.report import report
    from pcd.stages.run import run_recipe
    from pcd.stages.runs import open_run
    from pcd.stages.train import train

_HOMES = {
    "open_cache": "pcd.cache.store",
    "load_recipe": "pcd.recipe_files",
    "evaluate": "pcd.stages.evaluate",
    "extract": "pcd.stages.extract",
    "Predictor": "pcd.stages.predict",
    "report": "pcd.stages.report",
    "run_recipe": "pcd.stages.run",
    "open_run": "pcd.stages.runs",
    "train": "pcd.stages.train",
}

__all__ = [
    "Predictor",
    "__version__",
    "evaluate",
    "extract",
    "load_recipe",
    "open_cache",
    "open_run",
    "report",
    "run_recipe",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pcd' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
