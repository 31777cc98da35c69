"""`pcd protocols`."""

from __future__ import annotations

from typing import Annotated

import typer

from pcd.cli import options
from pcd.cli.app import LOOK, app, output, print_json


@app.command(rich_help_panel=LOOK, epilog="Example: pcd protocols --family kitti")
def protocols(
    family: Annotated[str | None, typer.Option(help="nyu, kitti or generic.", show_default="all")] = None,
    json: options.Json = False,
) -> None:
    """The named protocols in words: what each number of `evaluate` means."""
    from pcd.errors import UsageError, suggest
    from pcd.evaluation.protocols import ALIASES, CATALOGUE

    families = sorted({protocol.family for protocol in CATALOGUE})
    if family is not None and family not in families:
        raise UsageError(f"Unknown family {family!r}.{suggest(family, families)}")
    chosen = [protocol for protocol in CATALOGUE if family in (None, protocol.family)]
    if json:
        print_json([protocol.as_json() for protocol in chosen])
        return
    for protocol in chosen:
        names = [alias for alias, homes in ALIASES.items() if homes.get(protocol.family) == protocol.name]
        also = [f"also {name}" for name in names if name != protocol.name]
        output.print(f"[bold]{protocol.name}[/bold] ({', '.join([protocol.family, *also])})")
        output.print(f"  {protocol.describe()}", markup=False)
