"""Facts about this installation and machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path

import psutil
import torch

import pcd
from pcd.datasets import registry as datasets
from pcd.encoders import registry as encoders
from pcd.encoders.weights import cached_weights
from pcd.heads import registry as heads
from pcd.recipe_files import known_recipes

PACKAGES = (
    "torch",
    "open_clip_torch",
    "torchvision",
    "zarr",
    "numcodecs",
    "dask",
    "numpy",
    "opencv-python-headless",
    "safetensors",
)


def diagnose() -> dict[str, dict[str, str]]:
    """Sections of facts: versions, devices, weights, space, names that can be used."""
    return {
        "versions": {
            "pcd": pcd.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        "devices": _devices(),
        "weights found": {name: str(path) for name, path in cached_weights().items()}
        or {"none": "see --weights in the README"},
        "free space": {str(folder): f"{shutil.disk_usage(_existing(folder)).free / 1e9:.1f} GB" for folder in _folders()},
        "names": {
            "datasets": ", ".join(datasets.names()),
            "encoders": ", ".join(encoders.names()),
            "heads": ", ".join(heads.names()),
            "recipes": ", ".join(known_recipes()),
        },
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> dict[str, str]:
    memory = psutil.virtual_memory()
    facts = {"cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads, {memory.total / 1e9:.0f} GB of memory"}
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        facts[f"cuda:{number}"] = f"{device.name}, {device.total_memory / 1e9:.0f} GB"
    if not torch.cuda.device_count():
        facts["cuda"] = f"no device (torch built for CUDA {torch.version.cuda or 'none'})"
    return facts


def _folders() -> list[Path]:
    return [Path("cache"), Path("runs")]


def _existing(folder: Path) -> Path:
    return folder if folder.exists() else Path()
