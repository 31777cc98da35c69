"""A cache that this version wrote is kept as a file: what was written once is read bit for bit by every version to come.

`python -m tests.test_golden` writes it anew, under the name of the version and schema that wrote it, and only if there is none.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import pcd
from pcd.cache import Cache
from pcd.cache.manifest import SCHEMA
from pcd.errors import CacheError, CorruptError
from pcd.files import json_text
from pcd.fingerprint import digest
from pcd.stages.verify import verify
from tests.cache_support import FAR, SMALL
from tests.test_cli import Command
from tests.test_cli import pcd as pcd_
from tests.test_extract import files, toy_recipe

__all__ = ["pcd_"]
FOLDER = Path(__file__).parent / "golden"
ARCHIVES = sorted(FOLDER.glob("*.tar.xz"))
NAME = f"pcd-{pcd.__version__}-schema-{SCHEMA}"


def sums(cache: Cache) -> dict[str, str]:
    """SHA-256 of every column as it is read, shape and dtype included, and of every text."""
    found = {}
    for table in cache.tables:
        for name in table.column_names():
            column = table.column(name)
            found[f"{table.name}/{name}"] = sum_of(column.read(range(column.rows)))
    for text in cache.texts():
        embeddings = cache.text(text["encoder"], text["phrases"])
        assert embeddings is not None
        found[f"text/{'|'.join(text['phrases'])}"] = sum_of(embeddings)
    return found


def sum_of(array: Any) -> str:
    """Of shape, dtype and little-endian bytes."""
    data = np.ascontiguousarray(array).astype(np.asarray(array).dtype.newbyteorder("<")).tobytes()
    return hashlib.sha256(f"{array.shape} {array.dtype} ".encode() + data).hexdigest()


def decoded(row: np.ndarray, patches: int) -> np.ndarray:
    """Tokens from a stored row of int8, as the column's attributes say."""
    mean, scale = row[patches:].reshape(2, -1).view("<f4")
    tokens: np.ndarray = (mean + scale * row[:patches].astype("f4")).astype("f2")
    return tokens


@pytest.fixture(params=ARCHIVES, ids=lambda path: path.name.removesuffix(".tar.xz"))
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """The unpacked cache, and the sums noted when it was written."""
    with tarfile.open(request.param) as archive:
        archive.extractall(tmp_path, filter="data")
    noted: dict[str, str] = json.loads(request.param.with_name(request.param.name.replace(".tar.xz", ".json")).read_text())
    return tmp_path / "cache", noted


def test_there_is_one_of_this_schema() -> None:
    assert [path for path in ARCHIVES if f"schema-{SCHEMA}.tar" in path.name]
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 100_000


def test_what_was_written_once_is_read_bit_for_bit(golden: tuple[Path, dict[str, str]]) -> None:
    root, noted = golden
    with Cache.open(root) as cache:
        assert sums(cache) == noted
        assert cache.complete
    findings = verify(root)
    assert (findings.faults, findings.leftovers) == ([], [])


def test_zarr_reads_the_same_bits(golden: tuple[Path, dict[str, str]]) -> None:
    """Without pcd: every array is opened by its metadata, int8 tokens are decoded by what their attributes say."""
    root, noted = golden
    seen = set()
    for file in root.rglob("zarr.json"):
        if json.loads(file.read_text())["node_type"] != "array":
            continue
        array = zarr.open_array(file.parent, mode="r")
        attributes: Any = array.attrs.asdict()
        rows, name = np.asarray(array[:]), file.parent.relative_to(root).as_posix()
        if "compact" in attributes:
            rows = np.stack([decoded(row, attributes["compact"]["shape"][0]) for row in rows])
        if name.startswith("text/"):
            name = f"text/{'|'.join(attributes['phrases'])}"
        assert sum_of(rows) == noted[name]
        seen.add(name)
    assert seen == set(noted)


def test_the_same_extraction_has_nothing_to_do(golden: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns keep their fingerprints from version to version, or every cache there is would be refused."""
    from pcd.stages import plan
    from pcd.stages.extract import extract

    monkeypatch.setattr(plan, "MAX_SHARD_ROWS", 8)
    root, before = golden[0], files(golden[0])
    assert extract(toy_recipe(dataset=SMALL), root, device="cpu", also=[FAR]).encoded == 0
    assert files(root) == before


def test_a_later_schema_is_refused_by_name(pcd_: Command, golden: tuple[Path, dict[str, str]]) -> None:
    root = golden[0]
    value = json.loads((root / "manifest.json").read_text())
    value.pop("digest")
    value |= {"schema": SCHEMA + 1, "columns": [], "of a later version": {}}
    text = json_text({**value, "digest": digest(value)})
    for name in ("manifest.json", "commits/manifest.json"):
        (root / name).write_text(text)
    with pytest.raises(CacheError) as error:
        Cache.open(root)
    assert not isinstance(error.value, CorruptError)
    said = f"has schema {SCHEMA + 1}, this pcd reads schema {SCHEMA}; use the pcd that wrote it."
    assert said in str(error.value)
    before = files(root)
    for command in (["verify"], ["verify", "--repair"], ["inspect"]):
        code, out, err = pcd_("cache", command[0], str(root), *command[1:])
        assert (code, said in " ".join((out + err).split())) == (1, True), (command, out, err)
    with pytest.raises(CacheError, match="has schema"):
        from pcd.stages.extract import extract

        extract(toy_recipe(dataset=SMALL), root, device="cpu")
    assert files(root) == before


def write() -> None:
    """Write the archive and the sums of this version. Raises `FileExistsError` if they are there: they are never replaced."""
    import tempfile

    from pcd.datasets import registry as datasets
    from pcd.encoders import registry as encoders
    from pcd.stages import plan
    from pcd.stages.extract import extract

    datasets.add("toy", "tests.toy:ToyDataset")
    encoders.add("toy", "tests.toy:ToyEncoder")
    plan.MAX_SHARD_ROWS = 8
    FOLDER.mkdir(exist_ok=True)
    for name, tokens in ((NAME, "float16"), (f"int8-{NAME}", "int8")):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "cache"
            cache = extract(toy_recipe(dataset=SMALL), root, device="cpu", also=[FAR], tokens=tokens).cache  # type: ignore[arg-type]
            assert verify(root).faults == []
            with (FOLDER / f"{name}.tar.xz").open("xb") as file, tarfile.open(fileobj=file, mode="w:xz") as archive:
                contents = {**files(root), "provenance.jsonl": b""}
                for path, data in contents.items():
                    entry = tarfile.TarInfo(f"cache/{path}")  # no times, owners or modes of this machine
                    entry.size, entry.mode = len(data), 0o644
                    archive.addfile(entry, io.BytesIO(data))
            (FOLDER / f"{name}.json").write_text(json_text(sums(cache)))


if __name__ == "__main__":
    write()
