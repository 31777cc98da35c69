"""`pcd cache`: inspect, ls, verify, gc, copy and merge."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from pcd.cli import options
from pcd.cli.app import cache_app, errors, output, print_json, reporting
from pcd.errors import UsageError
from pcd.remote import any_path

if TYPE_CHECKING:
    from pcd.cache.copy import Copied
    from pcd.stages.repair import Repair
    from pcd.stages.verify import Findings

Where = Annotated[
    str, typer.Argument(metavar="PATH", help="Folder of the cache, or s3://..., gs://..., az://...", show_default=False)
]
SHOWN = 10


@cache_app.command(epilog="Example: pcd cache inspect cache/kitti")
def inspect(cache: Where, json: options.Json = False) -> None:
    """What is in a cache, how big, how complete, from which weights, and how it came about."""
    from pcd.cache import Cache
    from pcd.stages.inspect import describe_step, inspect_cache

    facts = inspect_cache(Cache.open(cache))
    if json:
        print_json(facts)
        return
    output.print(f"{facts['path']}: {facts['summary']}", soft_wrap=True)
    for name, value in facts["facts"].items():
        output.print(f"  {name}: {value}", soft_wrap=True, markup=False)
    table = _table(("column", "row", "tables", "rows", "on disk", "fingerprint"), right=("rows", "on disk"))
    for column in facts["columns"]:
        table.add_row(
            column["name"],
            f"{'x'.join(map(str, column['shape'])) or 'scalar'} {column['dtype']}",
            ", ".join(column["tables"]),
            f"{column['committed_rows']} of {column['rows']}",
            _size(column["bytes"]),
            column["fingerprint"],
        )
    output.print(table)
    for step in facts["history"]:
        output.print(f"  {describe_step(step)}", soft_wrap=True, markup=False)
    for key, reason in facts["skipped"].items():
        output.print(f"  skipped {key}: {reason}", soft_wrap=True, markup=False)


@cache_app.command(epilog="Example: pcd cache ls /data/caches")
def ls(
    folder: Annotated[str, typer.Argument(metavar="PATH", help="Where to look, at any depth.")] = "cache",
    json: options.Json = False,
) -> None:
    """All caches under a folder: data, encoder, how far, how big, how old."""
    from pcd.stages.caches import list_caches

    found = list_caches(any_path(folder))
    if json:
        print_json(found)
        return
    if not found:
        output.print(f"no caches under {folder}", soft_wrap=True)
        return
    table = _table(("cache", "dataset", "encoder", "samples", "done", "size", "age"), right=("size", "age"))
    for entry in found:
        if "error" in entry:
            table.add_row(escape(entry["path"]), "", "", "", "[red]damaged[/red]", _size(entry["bytes"]), "")
            continue
        samples = ", ".join(f"{name} {number}" for name, number in entry["tables"].items())
        shards = entry["shards"]
        far = "yes" if entry["complete"] else f"{100 * shards['committed'] / max(shards['of'], 1):.0f} % of shards"
        encoders = escape(", ".join(entry["encoders"]))
        row = (escape(entry["path"]), entry["dataset"], encoders, samples, far, _size(entry["bytes"]), _age(entry["seconds"]))
        table.add_row(*row)
    output.print(table)
    for entry in found:
        if "error" in entry:
            errors.print(entry["error"], soft_wrap=True, markup=False)


@cache_app.command(epilog="Example: pcd cache verify cache/kitti --repair")
def verify(
    cache: Where,
    fast: Annotated[bool, typer.Option("--fast", help="Records, sizes and shard indexes only; the data are not read.")] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Write what is damaged anew: metadata from the manifest, shards from the images.")
    ] = False,
    root: Annotated[Path | None, typer.Option(help="Folder of the dataset, if it has moved.", show_default=False)] = None,
    weights: options.Weights = None,
    device: options.Device = "auto",
) -> None:
    """Check that everything is there and whole: exit code 0 only then. What is absent is completed by `pcd extract`."""
    from pcd.stages.verify import verify as examine

    place = any_path(cache)
    with reporting() as progress:
        findings = examine(place, fast=fast, dataset_root=root, progress=progress)
    _show(cache, findings, fast)
    damaged = any(fault.kind == "damaged" for fault in findings.faults)
    if repair and damaged:
        from pcd.stages.origin import Place
        from pcd.stages.repair import repair as mend

        with reporting() as progress:
            done = mend(place, findings.faults, Place(root, weights, device), progress)
            findings = examine(place, fast=fast, dataset_root=root, progress=progress)
        _show_repair(done)
        _show(cache, findings, fast)
    elif damaged:
        errors.print(f"`pcd cache verify {cache} --repair` writes what is damaged anew.", soft_wrap=True, markup=False)
    if any(fault.kind == "absent" for fault in findings.faults):
        errors.print("What is absent is completed by the same `pcd extract`.")
    if findings.faults:
        raise typer.Exit(1)


@cache_app.command(epilog="Example: pcd cache gc cache/kitti --column depth-nearest/canvas")
def gc(
    cache: Where,
    column: Annotated[list[str] | None, typer.Option(help="Drop this column from all tables. Repeatable.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Drop columns, and remove what crashes left: shows what would go and asks first."""
    from pcd.cache.gc import collect, garbage

    root = any_path(cache)
    shown = garbage(root, column or ())
    for file in shown.left_alone[:SHOWN]:
        errors.print(f"left alone, not pcd's: {file.path}", soft_wrap=True, markup=False)
    if not shown.files and not shown.columns:
        output.print(f"{cache}: nothing to remove.", soft_wrap=True)
        return
    for name in shown.columns:
        size = sum(file.bytes for file in shown.files if f"/{name}/" in file.path)
        output.print(f"column {name}: {_size(size)}; only `pcd extract` brings it back", soft_wrap=True, markup=False)
    rest = [file for file in shown.files if not any(f"/{name}/" in file.path for name in shown.columns)]
    for file in rest[:SHOWN]:
        output.print(f"leftover {file.path}: {_size(file.bytes)}", soft_wrap=True, markup=False)
    if len(rest) > SHOWN:
        output.print(f"and {len(rest) - SHOWN} leftovers more", soft_wrap=True)
    output.print(f"{cache}: {len(shown.files)} files, {_size(shown.bytes)} would be removed.", soft_wrap=True)
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("there is no terminal to ask on; --yes removes these files without asking.")
        typer.confirm("Remove them?", abort=True)
    with reporting() as progress:
        progress.start("removing", len(shown.files), "files")
        won = collect(root, shown, progress.advance)
    output.print(f"{cache}: {_size(won)} removed.", soft_wrap=True)


@cache_app.command(
    epilog="Example: pcd cache copy /nfs/cache/kitti /scratch/kitti --columns clip/patch,clip/cls --tables train,val"
)
def copy(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder or address of the cache.", show_default=False)],
    target: Annotated[str, typer.Argument(metavar="DST", help="Folder or address of the copy.", show_default=False)],
    columns: Annotated[str | None, typer.Option(help="Only these, separated by commas.", show_default="all")] = None,
    tables: Annotated[str | None, typer.Option(help="Only these, separated by commas.", show_default="all")] = None,
) -> None:
    """Copy a cache, say to a local disk for training, verified on the way. The same command continues."""
    from pcd.cache import Cache
    from pcd.cache.copy import copy_cache

    with reporting() as progress:

        def start(total: int, done: int) -> None:
            progress.start("copying", total, "shards", done)

        kept, into = (value.split(",") if value else None for value in (columns, tables))
        with Cache.open(source) as opened:
            copied = copy_cache(opened, any_path(target), columns=kept, tables=into, start=start, advance=progress.advance)
    _show_copied(copied, target, f"absent in {source} too")


@cache_app.command(epilog="Example: pcd cache merge part-1 part-2 part-3 cache/kitti")
def merge(
    caches: Annotated[
        list[str],
        typer.Argument(metavar="SRC... DST", help="Folders of the caches, and of the one to be.", show_default=False),
    ],
) -> None:
    """Make one cache of several: parts of an extraction, other columns or splits of the same samples. Verified on the way."""
    from contextlib import ExitStack

    from pcd.cache import Cache
    from pcd.cache.merge import merge_caches

    *sources, target = caches
    if not sources:
        raise UsageError(f"pcd cache merge {target}: expected SRC... DST, at least two folders.")
    with reporting() as progress, ExitStack() as opened:

        def start(total: int, done: int) -> None:
            progress.start("merging", total, "shards", done)

        merged = [opened.enter_context(Cache.open(source)) for source in sources]
        copied = merge_caches(merged, any_path(target), start=start, advance=progress.advance)
    _show_copied(copied, target, "absent in all of them")


def _show_copied(copied: Copied, target: str, where: str) -> None:
    there = f", {copied.present} were there already" if copied.present else ""
    output.print(f"{target}: {copied.shards} shards copied, {_size(copied.bytes)}{there}.", soft_wrap=True)
    for detail in copied.damaged:
        errors.print(f"not copied: {detail}", soft_wrap=True, markup=False)
    if copied.absent:
        errors.print(f"{copied.absent} shards are {where}; once `pcd extract` made them, the same command continues.")
    if copied.damaged or copied.absent:
        raise typer.Exit(1)


def _show(cache: str, findings: Findings, fast: bool) -> None:
    for note in findings.notes:
        errors.print(f"note: {note}", style="yellow", soft_wrap=True, markup=False)
    if findings.leftovers:
        size, first = sum(file.bytes for file in findings.leftovers), findings.leftovers[0].path
        text = f"note: {len(findings.leftovers)} files ({_size(size)}) belong to nothing, such as {first}: see `pcd cache gc`."
        errors.print(text, style="yellow", soft_wrap=True, markup=False)
    if not findings.faults:
        looked = " (fast: the data were not read)" if fast else ""
        output.print(f"{cache}: {findings.shards} shards, everything is there and whole{looked}.", soft_wrap=True)
        return
    table = Table(title=f"{cache}: {len(findings.faults)} faults", title_justify="left")
    for heading in ("table", "column", "shard", "rows", "kind", "what is wrong"):
        table.add_column(heading, overflow="fold")
    for fault in findings.faults:
        shard = "" if fault.shard is None else str(fault.shard)
        table.add_row(fault.table, fault.column, shard, fault.rows, fault.kind, escape(fault.detail))
    output.print(table)


def _show_repair(done: Repair) -> None:
    for what in done.mended:
        errors.print(f"written anew: {what}", soft_wrap=True, markup=False)
    for note in done.notes:
        errors.print(f"note: {note}", style="yellow", soft_wrap=True, markup=False)
    if done.notes:
        errors.print("If images or weights lie elsewhere now, say where: --root DIR, --weights PATH.")


def _table(headings: tuple[str, ...], right: tuple[str, ...]) -> Table:
    table = Table()
    for heading in headings:
        narrow = heading in (headings[0], "fingerprint")
        table.add_column(heading, justify="right" if heading in right else "left", no_wrap=narrow, overflow="fold")
    return table


def _size(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def _age(seconds: float) -> str:
    for length, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"
