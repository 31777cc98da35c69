"""What OMP_WAIT_POLICY is worth: training from a cache with threads that sleep or spin while they wait.

    pcd demo --out demo && python benchmarks/waiting_threads.py demo/cache

Trains the demo's head for a few epochs in processes of their own, in turn with the variable unset and set to PASSIVE, first
on the machine as it is, then beside one busy process per core.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

EPOCHS, TRIALS = 4, 3
TRAIN = """
import sys, pcd
recipe = pcd.load_recipe("demo", ["train.epochs={epochs}"])
rates = []
pcd.train(recipe, pcd.open_cache(sys.argv[1]), __import__("pathlib").Path(sys.argv[2]), device="cpu",
          on_epoch=lambda report: rates.append(report.rows_per_second))
print(sorted(rates)[len(rates) // 2])
"""


def rate(cache: Path, policy: str | None) -> float:
    """Median rows per second over the epochs of one training."""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    if policy:
        environment["OMP_WAIT_POLICY"] = policy
    with tempfile.TemporaryDirectory() as run:
        command = [sys.executable, "-c", TRAIN.format(epochs=EPOCHS), str(cache), f"{run}/run"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    """Measure and print."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    cache, cores = Path(sys.argv[1]).resolve(), os.cpu_count() or 1
    print(f"{cores} cores {platform.machine()}; rows/s, median of {TRIALS} trainings and their range")
    for label, number in (("as it is", 0), (f"beside {cores} busy processes", cores)):
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
        try:
            rates: dict[str | None, list[float]] = {None: [], "PASSIVE": []}
            for _ in range(TRIALS):
                for policy, values in rates.items():
                    values.append(rate(cache, policy))
        finally:
            for process in busy:
                process.kill()
        for policy, values in rates.items():
            name = policy or "not set"
            print(f"{label:26}{name:10}{statistics.median(values):8.0f}  ({min(values):.0f} to {max(values):.0f})")


if __name__ == "__main__":
    main()
