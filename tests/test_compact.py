"""Tokens as int8: the coding against arithmetic written out, the store against other readers, and what refuses what."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pcd.cache import Cache, compact
from pcd.cache.copy import copy_cache
from pcd.cache.verify import verify_cache
from pcd.cache.writer import RangeWriter
from pcd.encoders import create_encoder
from pcd.errors import CacheError, CorruptError, FingerprintError, IncompleteError, UsageError
from pcd.stages import plan
from pcd.stages.evaluate import evaluate
from pcd.stages.repair import repair
from pcd.stages.runs import open_run
from pcd.stages.train import train
from tests.cache_support import HERE, local, small_shards
from tests.test_cli import TOY, Command, pcd
from tests.test_extract import files, run, toy_recipe
from tests.test_layers import layered, layered_toy
from tests.test_reader import Use, not_durable, threads
from tests.toy import ToyEncoder

__all__ = ["layered_toy", "not_durable", "pcd", "small_shards", "threads"]
PATCH = "clip/patch"
RECIPE = toy_recipe(
    head={"name": "pureclip", "min_depth": 0.1, "max_depth": 10.0, "table_init": "tokens"},
    train={"epochs": 2, "protocol": "eigen"},
)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cache, Cache]:
    """The same samples, tokens as float16 and as int8; not to be changed."""
    root = tmp_path_factory.mktemp("both")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "MAX_SHARD_ROWS", 8)
        return run(root / "plain", RECIPE).cache, run(root / "small", RECIPE, tokens="int8").cache


def by_hand(view: np.ndarray) -> tuple[list[list[int]], list[np.float32], list[np.float32]]:
    """Codes by patch and channel, means and scales, in Python's float64; its `round` rounds half to even."""
    means, scales, codes = [], [], []
    for channel in view.T.astype(object):
        values = [float(x) for x in channel]
        mean = np.float32(math.fsum(values) / len(values))
        reach = np.float32(max(abs(x - float(mean)) for x in values) / 127)
        fraction, exponent = math.frexp(float(reach))
        scale = np.float32(math.ldexp(math.ceil(math.ldexp(fraction, 16)), exponent - 16))
        means.append(mean)
        scales.append(scale)
        low, high = ((limit - float(mean)) / float(scale or 1) for limit in (-65504, 65504))
        nearest = [round((x - float(mean)) / float(scale)) if scale else 0 for x in values]
        codes.append([min(max(code, math.ceil(low)), math.floor(high)) for code in nearest])
    return [list(patch) for patch in zip(*codes, strict=True)], means, scales


tokens = hnp.arrays(
    np.float16, st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 7)), elements=st.floats(-65504, 65504, width=16)
)


@given(tokens, st.sampled_from([1.0, 2.0**-12, 2.0**-24]))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_coding_and_decoding_are_the_documented_arithmetic(rows: np.ndarray, factor: float) -> None:
    rows = (rows * np.float16(factor)).astype(np.float16)
    number, patches, width = rows.shape
    stored = compact.encode(rows, "column x")
    assert (stored.shape, stored.dtype) == ((number, patches + 8, width), np.dtype(np.int8))
    read = compact.decode(stored)
    for view, row, decoded in zip(rows, stored, read, strict=True):
        codes, means, scales = by_hand(view)
        vectors = np.frombuffer(row[patches:].tobytes(), dtype="<f4").reshape(2, width)
        assert row[:patches].tolist() == codes
        assert vectors[0].tolist() == means
        assert vectors[1].tolist() == scales
        for (patch, channel), value in np.ndenumerate(decoded):
            product = float(scales[channel]) * codes[patch][channel]
            assert float(np.float32(product)) == product  # exact, so that a fused multiply-add changes nothing
            assert value == np.float16(means[channel] + np.float32(product))
            error = abs(float(value) - float(view[patch, channel]))
            within = 1 if abs(float(view[patch, channel])) + scales[channel] > 65504 else 0.5
            assert (
                error
                <= within * float(scales[channel]) + abs(float(value)) / 1024 + 2**-24 + abs(float(means[channel])) / 2**23
            )


def test_no_finite_token_becomes_infinite() -> None:
    rows = np.array([0, -65472, *[-51100] * 4], dtype=np.float16).reshape(
        1, 6, 1
    )  # the nearest code of the second would be -65522
    assert np.isfinite(compact.decode(compact.encode(rows, "column x"))).all()


def test_halves_are_rounded_to_even_and_constant_channels_come_back_exact() -> None:
    values = [127.0, -127.0, 0.5, -0.5, 1.5, -1.5, 2.5, -2.5]
    rows = np.stack([values, [0.1] * 8, [-65504.0] * 8, [6e-8] * 8], axis=-1).astype(np.float16)[None]
    stored = compact.encode(rows, "column x")
    assert stored[0, :8, 0].tolist() == [127, -127, 0, 0, 2, -2, 2, -2]
    assert not stored[0, :8, 1:].any()
    assert np.array_equal(compact.decode(stored)[..., 1:], rows[..., 1:])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_tokens_that_are_not_finite_are_refused_by_row_and_nothing_is_committed(
    tmp_path: Path, value: float, both: tuple[Cache, Cache]
) -> None:
    manifest = replace(both[1].manifest, columns={})
    cache = Cache.create(tmp_path / "cache", manifest, {table.name: table.keys for table in both[1].tables})
    cache.add_columns(both[1].manifest.columns)
    rows = both[0].table("train").column(PATCH).read(range(8))
    rows[5, 3, 2] = value
    with (
        pytest.raises(CacheError, match="column clip/patch of table train, row 13: tokens that are not finite"),
        RangeWriter(cache.table("train"), [PATCH], 2, 4) as writer,
    ):
        writer.append({PATCH: rows})
    assert cache.table("train").column(PATCH).missing() == [(0, 44)]
    assert not list((tmp_path / "cache").rglob("*.partial"))
    for wrong in (rows.astype(np.float32), rows[:, 1:]):
        with pytest.raises(ValueError, match="to code, expected"), RangeWriter(cache.table("train"), [PATCH], 0, 2) as writer:
            writer.append({PATCH: wrong})


@pytest.mark.parametrize("number", [1, 3])
def test_zarr_and_the_formula_read_the_same_bits(both: tuple[Cache, Cache], number: int, threads: Use) -> None:
    threads(number)
    for table in both[1].tables:
        array = zarr.open_group(str(both[1].root), mode="r")[f"{table.name}/{PATCH}"]
        assert isinstance(array, zarr.Array)
        form: Any = array.attrs["compact"]
        raw, (patches, width) = np.asarray(array[:]), form["shape"]
        assert (array.dtype, array.shape[1:]) == (np.dtype(np.int8), (patches + 8, width))
        vectors = np.ascontiguousarray(raw[:, patches:]).reshape(len(raw), 2, -1).view("<f4")
        wanted = (vectors[:, :1] + vectors[:, 1:] * raw[:, :patches].astype("f4")).astype("f2")
        scope: dict[str, Any] = {"r": raw[3], "shape": form["shape"]}
        exec(form["decode"].partition(": ")[2].replace("r[P:]", f"r[{patches}:]").replace("r[:P]", f"r[:{patches}]"), scope)
        assert np.array_equal(scope["tokens"], wanted[3])  # the words of the attribute are the formula itself
        column = table.column(PATCH)
        order = np.random.default_rng(0).permutation(len(raw))
        assert np.array_equal(column.read(order).view(np.uint16), wanted[order].view(np.uint16))
        assert np.array_equal(np.asarray(column.as_dask().compute()).view(np.uint16), wanted.view(np.uint16))
        assert np.array_equal(pickle.loads(pickle.dumps(column)).read([1, 0]), wanted[[1, 0]])
        odd = np.frombuffer(bytearray(2 * column.spec.row_bytes + 1), dtype=np.uint8)[1:]
        target = odd.view(np.float16).reshape(2, patches, width)  # at an odd address
        assert column.read([2, 0], target) is target
        assert np.array_equal(target, wanted[[2, 0]])
        near = both[0].table(table.name).column(PATCH).read(range(len(raw)))
        assert np.abs(near - wanted).max() <= 1 / 127
        assert np.array_equal(near[..., 5], wanted[..., 5])  # the toy's constant channel


def test_readers_see_float16_and_only_the_tokens_differ(both: tuple[Cache, Cache]) -> None:
    plain, small = (cache.manifest for cache in both)
    column = both[1].table("val").column(PATCH)
    assert column.spec == column.entry.spec == plain.columns[PATCH].spec
    assert (column.stored.shape, column.stored.dtype) == ((24, 6), "int8")
    assert small.columns[PATCH].spec == column.stored
    assert small.columns[PATCH].fingerprint == {**plain.columns[PATCH].fingerprint, "compact": "int8"}
    assert plain.columns[PATCH].fingerprint.keys() == {"schema", "dataset", "tables", "views", "column", "encoder"}
    assert plain.columns[PATCH].attributes == {}
    assert "compact" not in plain.text()
    for name, entry in plain.columns.items():
        if name != PATCH:
            assert small.columns[name] == entry
    assert verify_cache(both[1]) == []
    size = {cache: sum(f.stat().st_size for f in (cache.root / "train" / PATCH).glob("c/*/0/0")) for cache in both}
    assert size[both[1]] < size[both[0]]


def test_the_form_is_kept_and_another_one_refused(
    tmp_path: Path, both: tuple[Cache, Cache], monkeypatch: pytest.MonkeyPatch
) -> None:
    for cache, other, own in ((both[0], "int8", "float16"), (both[1], "float16", "int8")):
        before = files(local(cache.root))
        with pytest.raises(FingerprintError, match=f"stores its tokens as {own}, and {other} was asked.*--tokens {own}"):
            run(local(cache.root), RECIPE, tokens=other)
        assert run(local(cache.root), RECIPE, tokens=own).encoded == run(local(cache.root), RECIPE).encoded == 0
        assert files(local(cache.root)) == before
    original, stop = ToyEncoder.encode, ToyEncoder.calls + 3

    def interrupted(self: ToyEncoder, views: Any) -> Any:
        if ToyEncoder.calls >= stop:
            raise KeyboardInterrupt
        return original(self, views)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ToyEncoder, "encode", interrupted)
        run(tmp_path / "parts", RECIPE, tokens="int8", batch_views=4)
    with pytest.raises(IncompleteError):
        Cache.open(tmp_path / "parts").table("train").column(PATCH).read([43])
    run(tmp_path / "parts", RECIPE, batch_views=4)
    assert files(tmp_path / "parts") == files(local(both[1].root))


def test_layers_that_are_added_have_the_form_of_the_cache(tmp_path: Path) -> None:
    run(tmp_path, layered(), tokens="int8")
    cache = run(tmp_path, layered(2)).cache
    assert cache.table("train").column(f"{PATCH}@2").stored.dtype == "int8"
    first, second = (cache.table("train").column(name).read(range(44)) for name in (PATCH, f"{PATCH}@2"))
    assert np.array_equal(second, 2 * first)  # twice the values have twice the mean and scale, and the same codes
    assert verify_cache(cache) == []


def test_an_encoder_without_float16_patch_tokens_has_no_int8_form(both: tuple[Cache, Cache]) -> None:
    encoder = create_encoder("toy:toy", {}, (16, 16), "cpu")
    encoder.columns = encoder.columns[1:]
    manifest = replace(both[0].manifest, columns={})
    with pytest.raises(UsageError, match=r"--tokens int8: of the encoder's columns \(clip/cls\) none"):
        plan.plan_columns(manifest, encoder, ["masked-bilinear"], None, "int8")
    assert plan.stored_form(manifest) is None


def test_damage_in_codes_and_vectors_is_met_and_repaired_and_a_copy_reads_alike(
    tmp_path: Path, both: tuple[Cache, Cache]
) -> None:
    root = tmp_path / "copy"
    assert copy_cache(both[1], root, columns=[PATCH, "clip/cls"]).damaged == []
    wanted = both[1].table("train").column(PATCH).read(range(8))
    assert np.array_equal(Cache.open(root).table("train").column(PATCH).read(range(8)), wanted)
    shard, row = root / "train" / PATCH / "c/0/0/0", 24 * 6 + 4
    for offset in (5, 16 * 6 + 20):  # a code of row 0, a byte of its scales
        whole = shard.read_bytes()
        shard.write_bytes(bytes([*whole[: row + offset], whole[row + offset] ^ 4, *whole[row + offset + 1 :]]))
        column = Cache.open(root).table("train").column(PATCH)
        assert np.array_equal(column.read([0, 2]), wanted[[0, 2]])
        with pytest.raises(CorruptError, match=r"column clip/patch, table train, row 1: .*crc32c"):
            column.read([0, 1])
        faults = verify_cache(Cache.open(root))
        assert [(fault.column, fault.shard) for fault in faults] == [(PATCH, 0)]
        assert repair(root, faults, HERE).notes == []
        assert shard.read_bytes() == whole


def test_a_later_form_is_refused(both: tuple[Cache, Cache]) -> None:
    cache = Cache.open(both[1].root)
    cache.manifest.columns[PATCH].attributes["compact"]["form"] = "int4"
    with pytest.raises(CacheError, match="clip/patch is stored in the form 'int4', this pcd reads int8"):
        cache.table("train").column(PATCH)


def test_training_reads_the_same_bits_wherever_tokens_are_held_and_does_not_change_forms(
    tmp_path: Path, both: tuple[Cache, Cache]
) -> None:
    held, streamed = (train(RECIPE, both[1], tmp_path / r, device="cpu", residency=r) for r in ("host", "stream"))
    weights = [run.load_head("last", torch.device("cpu"))[0].state_dict() for run in (held, streamed)]
    assert all(bool((weights[0][name] == weights[1][name]).all()) for name in weights[0])
    assert held.info["shapes"][PATCH] == [16, 6]
    assert held.info["columns"][PATCH]["compact"] == "int8"
    longer = RECIPE.model_copy(update={"train": RECIPE.train.model_copy(update={"epochs": 3})})
    with pytest.raises(FingerprintError, match="compact: found 'nothing', wanted 'int8'"):
        train(longer, both[0], tmp_path / "host", device="cpu")
    scores = [evaluate(open_run(held.root), cache, protocols=["eigen"], device="cpu") for cache in both]
    first, second = (score.metrics("eigen")["abs_rel"] for score in scores)
    assert first == pytest.approx(second, rel=0.05)


def test_the_command_line_makes_shows_and_checks_int8_tokens(pcd: Command) -> None:
    make = ["extract", "--dataset", "toy", "--encoder", "toy:toy", "--weights", "random", "--device", "cpu"]
    assert pcd(*make, "--tokens", "int8")[0] == 0
    code, out, _ = pcd("cache", "inspect", "cache/toy")
    assert code == 0
    assert "float16 as int8" in out
    columns = json.loads(pcd("cache", "inspect", "cache/toy", "--json")[1])["manifest"]["columns"]
    assert columns[PATCH]["attributes"]["compact"]["form"] == "int8"
    assert pcd("cache", "verify", "cache/toy")[0] == 0
    code, _, err = pcd(*make, "--tokens", "float16")
    assert code == 2
    assert "cache/toy stores its tokens as int8, and float16 was asked for" in err
    code, _, err = pcd(*make)
    assert code == 0
    assert "is complete" in err
    assert pcd("train", "--cache", "cache/toy", "--run", "runs/one", *TOY)[0] == 0
    assert pcd("evaluate", "--run", "runs/one", "--protocol", "eigen")[0] == 0
