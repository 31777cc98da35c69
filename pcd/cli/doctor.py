"""`pcd doctor`."""

from __future__ import annotations

from rich.table import Table

from pcd.cli import options
from pcd.cli.app import LOOK, app, output, print_json


@app.command(rich_help_panel=LOOK, epilog="Example: pcd doctor --json")
def doctor(json: options.Json = False) -> None:
    """Versions, devices, weights found and free space: what to look at first when something does not work."""
    from pcd.stages.doctor import diagnose

    facts = diagnose()
    if json:
        print_json(facts)
        return
    for heading, values in facts.items():
        table = Table(title=heading, title_justify="left", show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in values.items():
            table.add_row(name, str(value))
        output.print(table)
