"""Repair: bring a damaged cache back to the bytes it had.

Metadata is written again from the manifest, the manifest from its spare copy, sample lists from the dataset, damaged shards and
texts by the extraction that made them, for exactly their samples. What is absent, never committed, is left to `pcd extract`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from pcd.cache import Cache, ColumnEntry, Table, commits, provenance
from pcd.cache.fault import Fault
from pcd.cache.lock import writing
from pcd.cache.manifest import MANIFEST, SPARE
from pcd.cache.metadata import open_damaged, sealed, zarr_files
from pcd.cache.table import SAMPLES
from pcd.cache.texts import METADATA, TEXT, read_attributes, text_folder
from pcd.cache.verify import damaged_shards
from pcd.errors import CacheError, CorruptError, FingerprintError, PcdError
from pcd.files import write_bytes, write_json
from pcd.fingerprint import differences, digest
from pcd.progress import SILENT, Progress
from pcd.remote import AnyPath
from pcd.stages.needs import needs_of_all, shipped_recipes
from pcd.stages.origin import Origin, Place
from pcd.stages.shard_task import device_name, fill_table, views_per_batch

if TYPE_CHECKING:
    from pcd.encoders.base import Encoder

Shards = dict[tuple[str, str], set[int]]
HERE = Place()
"""Everything is where the extraction found it."""


@dataclass
class Repair:
    """What was written anew, and what could not be mended or differs from before, with the reason."""

    mended: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def attempt(self, what: str, action: Callable[[], None]) -> bool:
        """Do it and say so, or say why it cannot be done; whether it was done."""
        try:
            action()
        except (PcdError, OSError) as error:
            self.notes.append(f"{what} could not be mended: {error}")
            return False
        self.mended.append(what)
        return True


def repair(root: AnyPath, faults: list[Fault], place: Place = HERE, progress: Progress = SILENT) -> Repair:
    """Mend what `faults`, found by `pcd.stages.verify.verify`, name.

    Raises `CacheError` if the cache is being written, cannot be written, or has no manifest that can be read.
    """
    done = Repair()
    with writing(root), open_damaged(root)[0] as cache:
        origin = Origin(cache, place)
        _mend_files(origin, list(dict.fromkeys(fault.path for fault in faults if fault.path)), done)
        if shards := damaged_shards(faults):
            done.attempt(_count(shards), lambda: _mend_shards(origin, shards, done, progress))
        for folder in dict.fromkeys(PurePosixPath(f.path).parent for f in faults if f.path.startswith(f"{TEXT}/")):
            done.attempt(folder.as_posix(), _Call(_mend_text, origin, cache.root / folder))
        if done.mended:
            facts = {"device": device_name(place.device), "repaired": done.mended, "notes": done.notes, "skipped": {}}
            provenance.append(root, facts)
    return done


class _Call:
    """A call to be made later."""

    def __init__(self, function: Callable[..., None], *arguments: object) -> None:
        self._function, self._arguments = function, arguments

    def __call__(self) -> None:
        self._function(*self._arguments)


def _count(shards: Shards) -> str:
    number = sum(map(len, shards.values()))
    return f"{number} shard{'s' * (number != 1)} of {', '.join(dict.fromkeys(column for _, column in shards))}"


def _mend_files(origin: Origin, paths: list[str], done: Repair) -> None:
    """Manifest, provenance, sample lists and Zarr metadata."""
    cache, root = origin.cache, origin.cache.root
    if MANIFEST in paths or SPARE in paths:
        done.attempt("manifest", _Call(_mend_manifest, cache, MANIFEST in paths))
    if provenance.PROVENANCE in paths:
        done.attempt("provenance, but for lines that cannot be read", _Call(provenance.drop_unreadable, root))
    for path in paths:
        if path.endswith(f"/{SAMPLES}"):
            done.attempt(path, _Call(_mend_samples, origin, path.removesuffix(f"/{SAMPLES}")))
    wanted = zarr_files(cache.manifest)
    broken = [path for path in paths if path in wanted]
    if broken and not sealed(root):  # made by an earlier pcd: either the manifest was changed or the metadata
        try:
            _vouch(origin)
        except (PcdError, OSError) as error:
            done.notes.append(f"{', '.join(broken)} could not be mended: {MANIFEST} has no digest, and {error}")
            return
    for path in broken:
        done.attempt(path, _Call(write_bytes, root / path, wanted[path]))


def _mend_manifest(cache: Cache, was_changed: bool) -> None:
    """`cache` was opened by whichever of manifest and spare copy is whole."""
    if was_changed and not (cache.root / SPARE).is_file():
        raise CacheError(f"there is no {SPARE} to restore {MANIFEST} from; restore it from a copy of your own.")
    cache.manifest.write(cache.root)


def _mend_samples(origin: Origin, table: str) -> None:
    keys = [list(plan.keys) for plan in origin.tables if plan.name == table]
    if not keys or digest(keys[0]) != origin.cache.manifest.tables[table].digest:
        raise CacheError(f"the dataset's list is not the one that {origin.cache.root} was made from.")
    write_json(origin.cache.root / table / SAMPLES, keys[0])


def _vouch(origin: Origin) -> None:
    """Raise unless dataset and encoders give the very columns that the manifest names."""
    known: dict[str, ColumnEntry] = {}
    for encoder in origin.encoders:
        known |= origin.planned(encoder)
    for name, entry in origin.cache.manifest.columns.items():
        if name not in known or known[name].spec != entry.spec or differences(known[name].fingerprint, entry.fingerprint):
            raise CacheError(f"its column {name} is not what dataset and encoder give; restore it from a copy of your own.")


def _mend_shards(origin: Origin, shards: Shards, done: Repair, progress: Progress) -> None:
    """Write damaged shards anew, each with the encoder that determines it (or its grid of patches)."""
    left, lines = dict(shards), []
    for encoder in origin.encoders:
        planned, columns = origin.planned(encoder), origin.cache.manifest.columns
        mine: Shards = {}
        for key, numbers in left.items():
            wanted = columns[key[1]].fingerprint
            other = differences(planned[key[1]].fingerprint, wanted) if key[1] in planned else ["column: found nothing"]
            lines += other
            mine |= {} if other else {key: numbers}
        _refill(origin, encoder, mine, done, progress)
        left = {key: numbers for key, numbers in left.items() if key not in mine}
    if left:
        shown = "\n".join(f"  {line}" for line in dict.fromkeys(lines))
        raise FingerprintError(f"{_count(left)} were made another way:\n{shown}\nGive --root, --weights and --device as then.")


def _refill(origin: Origin, encoder: Encoder, shards: Shards, done: Repair, progress: Progress) -> None:
    from pcd.stages.rows import RowMaker

    manifest = origin.cache.manifest
    batch = origin.batch_views or views_per_batch(origin.place.device)
    maker = RowMaker(origin.dataset, manifest.plan, encoder, manifest.columns, origin.resizes, "skip", batch)
    for plan in origin.tables:
        bad = [(name, shard) for (table, name), numbers in shards.items() if table == plan.name for shard in sorted(numbers)]
        if not bad:
            continue
        table = origin.cache.table(plan.name)
        before = {place: _sha256(table, *place) for place in bad}
        with _dropped(table, bad):
            fill_table(table, plan, maker, progress, {shard * manifest.columns[name].shard_samples for name, shard in bad})
        for name, shard in bad:
            if before[name, shard] not in (None, _sha256(table, name, shard)):
                done.notes.append(
                    f"{table.name}/{name}, shard {shard}: written anew, but not bit for bit what was recorded: another device, "
                    "number of threads or version rounds differently"
                )


def _sha256(table: Table, column: str, shard: int) -> str | None:
    """What the shard's record says its bytes are, or None if it says nothing reliable."""
    try:
        return commits.read(table.root, table.name, column, shard).sha256
    except (CorruptError, FileNotFoundError):
        return None


@contextmanager
def _dropped(table: Table, shards: list[tuple[str, int]]) -> Iterator[None]:
    """Without the records of these shards, so that they are written; on an error those that were not come back.

    They may be of shards most of whose rows are good.
    """
    paths = [commits.path(table.root, table.name, name, shard) for name, shard in shards]
    records = {path: path.read_bytes() for path in paths}
    for path in paths:
        path.unlink()
    table.close()
    for name, _ in shards:
        table.column(name).refresh()
    try:
        yield
    except BaseException:
        for path, data in records.items():
            if not path.exists():
                write_bytes(path, data)
        raise


def _mend_text(origin: Origin, folder: AnyPath) -> None:
    """Embed the phrases again; if nobody knows them any more, drop the metadata, so that `extract` embeds what it needs."""
    cache = origin.cache
    for encoder in origin.encoders:
        name = digest(encoder.fingerprint())
        for phrases in _known_phrases(origin, folder):
            if encoder.has_text and text_folder(cache.root, name, phrases) == folder:
                cache.add_text(name, phrases, encoder.embed_text(phrases).numpy())
                return
    (folder / METADATA).unlink(missing_ok=True)
    raise CacheError("nothing says which phrases it holds. It was dropped; the same `pcd extract` embeds them again.")


def _known_phrases(origin: Origin, folder: AnyPath) -> list[list[str]]:
    """Lists of phrases that may be meant: the damaged metadata's own, those of past extractions, those of the recipes."""
    known = [texts for entry in provenance.records(origin.cache.root) for texts in entry.get("texts", [])]
    known += [list(texts) for texts in needs_of_all(shipped_recipes(origin.cache.manifest.dataset["name"])).phrases]
    try:
        return [read_attributes(folder)["phrases"], *known]
    except CorruptError:
        return known
