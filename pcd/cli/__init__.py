"""The command line: one module per command."""

from pcd.cli import cache, demo, doctor, evaluate, export, extract, predict, protocols, report, run, show, sweep, train
from pcd.cli.app import main

__all__ = [
    "cache",
    "demo",
    "doctor",
    "evaluate",
    "export",
    "extract",
    "main",
    "predict",
    "protocols",
    "report",
    "run",
    "show",
    "sweep",
    "train",
]
