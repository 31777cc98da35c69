"""Run what a document tells its reader to run: every `sh` and `python` block, in order, in one scratch folder.

A block whose line before says `<!-- needs: ... -->` is left out, and what it needs is printed: it asks for data or hardware
that not every machine has.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BLOCK = re.compile(
    r"(?:<!-- needs: (?P<needs>[^>]+) -->\n)?^```(?P<language>sh|python)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)


def main(document: Path) -> int:
    """Returns the number of blocks that failed."""
    python = Path(sys.executable)
    environment = {**os.environ, "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "160"}
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        for match in BLOCK.finditer(document.read_text(encoding="utf-8")):
            first = match["code"].splitlines()[0]
            if match["needs"]:
                print(f"left out, needs {match['needs']}: {first}", flush=True)
                continue
            command = ["bash", "-euo", "pipefail", "-c"] if match["language"] == "sh" else [str(python), "-W", "error", "-c"]
            begin = time.perf_counter()
            done = subprocess.run([*command, match["code"]], cwd=scratch, env=environment, capture_output=True, text=True)
            print(f"{'ok    ' if done.returncode == 0 else 'FAILED'} {time.perf_counter() - begin:5.1f} s: {first}", flush=True)
            if done.returncode:
                print(match["code"], done.stdout, done.stderr, sep="\n---\n")
                failed += 1
    return failed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
