"""Commands on a cache in an object store, looked after, copied there and back: all as with a folder."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch

from pcd.cache import Cache
from pcd.cache.copy import copy_cache
from pcd.cache.merge import merge_caches
from pcd.errors import CacheError, UsageError
from pcd.remote import RemotePath, any_path
from pcd.stages.extract import extract
from pcd.stages.runs import newest_run, open_run
from pcd.stages.verify import verify
from tests.store_support import Server, objects_of, remote, server, store
from tests.test_cli import TOY, Command, pcd
from tests.test_extract import files, toy_recipe

__all__ = ["pcd", "server", "store"]
EXTRACT = ("extract", "--dataset", "toy", "--encoder", "toy:toy", "--weights", "random", "--device", "cpu")


def done(pcd: Command, *args: str) -> str:
    """What a command says that must succeed."""
    code, out, err = pcd(*args)
    assert code == 0, err
    return out + err


def test_trained_and_scored_as_from_disk(pcd: Command, store: RemotePath) -> None:
    done(pcd, *EXTRACT, "--cache", "cache/toy")
    done(pcd, *EXTRACT, "--cache", str(store))
    assert "Nothing to do" in done(pcd, *EXTRACT, "--cache", str(store))
    done(pcd, "train", "--cache", "cache/toy", "--run", "runs/near", "--residency", "host", *TOY)
    near = open_run("runs/near")
    for place in ("stream", "host"):
        done(pcd, "train", "--cache", str(store), "--run", f"runs/{place}", "--residency", place, *TOY)
        far = open_run(f"runs/{place}")
        ours, theirs = (found.load_head("last", torch.device("cpu"))[0].state_dict() for found in (far, near))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    scores = [json.loads(pcd("evaluate", "--run", f"runs/{name}", "--json")[1]) for name in ("near", "stream")]
    assert scores[1]["cache"] == str(store)
    assert scores[0]["protocols"] == scores[1]["protocols"]
    done(pcd, "train", "--cache", str(store), *TOY, "--set", "train.epochs=1")
    assert newest_run().root.name.startswith(f"{store.name}-")
    shown = [json.loads(pcd("show", place, "--json")[1]) for place in ("cache/toy", str(store))]
    assert {**shown[0], "path": "", "cache": ""} == {**shown[1], "path": "", "cache": ""}
    assert [Path(each["path"]).name for each in shown] == ["toy", store.name]


def test_a_cache_that_is_no_longer_there(pcd: Command, store: RemotePath) -> None:
    done(pcd, *EXTRACT, "--cache", str(store), "--limit", "4")
    done(pcd, "train", "--cache", str(store), "--run", "runs/one", *TOY)
    for path, _ in store.walk():
        path.unlink()
    code, _, err = pcd("evaluate", "--run", "runs/one")
    assert code
    assert f"was trained on {store}, which is not there; say where it is with --cache" in err
    for address, words in (("s3://no-such-bucket/x", "there is no bucket no-such-bucket"), ("s4://x/y", "Did you mean 's3'")):
        for args in (("train", "--cache", address), ("cache", "inspect", address), (*EXTRACT, "--cache", address)):
            code, _, err = pcd(*args)
            assert code
            assert words in err
            assert "Traceback" not in err


def test_a_file_address_is_a_folder(pcd: Command, tmp_path: Path) -> None:
    done(pcd, *EXTRACT, "--cache", f"file://{tmp_path}/cache/toy", "--limit", "4")
    assert "Nothing to do" in done(pcd, *EXTRACT, "--cache", "cache/toy", "--limit", "4")
    facts = [json.loads(pcd("cache", "inspect", place, "--json")[1]) for place in ("cache/toy", f"file://{tmp_path}/cache/toy")]
    assert facts[0] == {**facts[1], "path": "cache/toy"}
    done(pcd, "cache", "verify", f"file://{tmp_path}/cache/toy", "--fast")


def test_commands_that_look_after_caches(pcd: Command, store: RemotePath) -> None:
    done(pcd, *EXTRACT, "--cache", "cache/toy", "--limit", "6")
    source, whole, part = files(Path("cache/toy")), f"{store}/whole", f"{store}/deep/part"
    done(pcd, "cache", "copy", "cache/toy", whole)
    assert objects_of(store / "whole") == source
    assert "everything is there and whole" in done(pcd, "cache", "verify", whole)
    shown = [json.loads(pcd("cache", "inspect", place, "--json")[1]) for place in ("cache/toy", whole)]
    assert [each.pop("path") for each in shown] == ["cache/toy", whole]
    assert shown[0] == shown[1]
    (store / "whole/train/clip/cls/c/0/0").unlink()
    code, out, err = pcd("cache", "verify", whole, "--fast")
    assert code == 1
    assert "is gone" in out.replace("\n", "")
    assert f"`pcd cache verify {whole} --repair`" in err
    code, _, err = pcd("cache", "copy", whole, "cache/back")
    assert code == 1
    assert f"not copied: {whole}/train/clip/cls/c/0/0" in err
    assert "written anew" in done(pcd, "cache", "verify", whole, "--repair", "--device", "cpu")
    assert "1 shards copied" in done(pcd, "cache", "copy", whole, "cache/back")
    assert objects_of(store / "whole") == files(Path("cache/back")) == source
    done(pcd, "cache", "copy", "cache/toy", part, "--tables", "test")
    done(pcd, "cache", "copy", "cache/toy", "cache/rest", "--tables", "train,val")
    done(pcd, "cache", "merge", part, "cache/rest", "cache/merged")
    assert files(Path("cache/merged")) == source
    listed = done(pcd, "cache", "ls", str(store))
    assert all(address in listed for address in (whole, part))
    assert "removed" in done(pcd, "cache", "gc", part, "--column", "depth/canvas", "--yes")
    assert not (store / "deep/part/test/depth/canvas").exists()


class StoppedError(Exception):
    """Ctrl-C, as it were."""


@pytest.mark.parametrize("there", [True, False], ids=["to the store", "from the store"])
def test_a_copy_goes_on_where_it_was_stopped(store: RemotePath, tmp_path: Path, there: bool) -> None:
    extract(toy_recipe(dataset={"train": 5, "test": 1}), tmp_path / "cache", device="cpu")
    place = any_path(tmp_path / "cache")
    if not there:
        copy_cache(Cache.open(place), store / "cache")
        place = store / "cache"
    target = store / "copy" if there else tmp_path / "copy"
    turns, busy = [0], threading.Lock()

    def stop() -> None:
        with busy:
            turns[0] += 1
            if turns[0] == 10:
                raise StoppedError

    with pytest.raises(StoppedError):
        copy_cache(Cache.open(place), target, advance=stop)
    assert {fault.kind for fault in verify(target, fast=True).faults} == {"absent"}
    copied = copy_cache(Cache.open(place), target)
    assert (copied.present >= 10, copied.damaged) == (True, [])
    found = objects_of(target) if isinstance(target, RemotePath) else files(target)
    assert found == files(tmp_path / "cache")


def test_one_does_not_lie_in_the_other(store: RemotePath, server: Server) -> None:
    extract(toy_recipe(dataset={"train": 2, "test": 1}), store, device="cpu")
    for target in (store, store / "inside"):
        with pytest.raises(UsageError, match="inside of it"):
            copy_cache(Cache.open(store), target)
    (remote("strangers") / "notes.txt").put(b"mine")
    with pytest.raises(CacheError, match=r"holds other files \(notes.txt\) and no cache"):
        merge_caches([Cache.open(store)], remote("strangers"))
