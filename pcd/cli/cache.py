"""`pcd cache inspect` and `pcd cache verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from pcd.cli import options
from pcd.cli.app import cache_app, errors, output, print_json, reporting

Where = Annotated[Path, typer.Argument(help="Folder of the cache.", show_default=False)]


@cache_app.command(epilog="Example: pcd cache inspect cache/kitti")
def inspect(cache: Where, json: options.Json = False) -> None:
    """What is in a cache, how big, how complete, and from which weights."""
    from pcd.cache import Cache
    from pcd.stages.inspect import inspect_cache

    facts = inspect_cache(Cache.open(cache))
    if json:
        print_json(facts)
        return
    output.print(f"{facts['path']}: {facts['summary']}", soft_wrap=True)
    for name, value in facts["facts"].items():
        output.print(f"  {name}: {value}", soft_wrap=True, markup=False)
    table = Table()
    for heading in ("column", "row", "dtype", "tables", "rows", "committed", "on disk"):
        table.add_column(heading, justify="right" if heading in ("rows", "committed", "on disk") else "left")
    for column in facts["columns"]:
        table.add_row(
            column["name"],
            "x".join(map(str, column["shape"])) or "scalar",
            column["dtype"],
            ", ".join(column["tables"]),
            str(column["rows"]),
            f"{100 * column['committed_rows'] / max(column['rows'], 1):.0f} %",
            f"{column['bytes'] / 1e6:.1f} MB",
        )
    output.print(table)
    for key, reason in facts["skipped"].items():
        output.print(f"  skipped {key}: {reason}", soft_wrap=True, markup=False)


@cache_app.command(epilog="Example: pcd cache verify cache/kitti")
def verify(
    cache: Where,
    forget: Annotated[
        bool, typer.Option("--forget", help="Drop the records of damaged shards, so that extract writes exactly those anew.")
    ] = False,
) -> None:
    """Check that everything is there and whole: exit code 0 only then."""
    from pcd.cache import Cache
    from pcd.cache.verify import forget as drop
    from pcd.cache.verify import shard_count, verify_cache

    opened = Cache.open(cache)
    with reporting() as progress:
        progress.start("verifying", shard_count(opened), "shards")
        faults = verify_cache(opened, progress.advance)
    if not faults:
        output.print(f"{cache}: {shard_count(opened)} shards, everything is there and whole.", soft_wrap=True)
        return
    table = Table(title=f"{cache}: {len(faults)} faults", title_justify="left")
    for heading in ("table", "column", "shard", "rows", "kind", "what is wrong"):
        table.add_column(heading, overflow="fold")
    for fault in faults:
        shard = "" if fault.shard is None else str(fault.shard)
        table.add_row(fault.table, fault.column, shard, fault.rows, fault.kind, escape(fault.detail))
    output.print(table)
    if forget:
        errors.print(f"{drop(opened, faults)} records dropped; the same `pcd extract` writes these shards anew.")
    elif any(fault.kind == "damaged" for fault in faults):
        errors.print("`pcd cache verify --forget` drops the damaged shards' records, then `pcd extract` writes them anew.")
    else:
        errors.print("The same `pcd extract` completes the cache.")
    raise typer.Exit(1)
