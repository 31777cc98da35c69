"""Seeded, grouped and sequential splits."""

import hashlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pcd.datasets.split import last_part, train_val
from pcd.errors import UsageError

KEYS = [f"scene_{i // 10}/{i:05d}" for i in range(103)]
SCENES = {key: key.split("/")[0] for key in KEYS}


@pytest.mark.parametrize(("count", "held"), [(24231, 2423), (23158, 2316), (10, 1), (2, 1), (1, 0), (0, 0), (3, 1)])
def test_the_number_held_out(count, held):
    train, val = train_val([f"k{i}" for i in range(count)], seed=0)
    assert (len(train), len(val)) == (count - held, held)


def test_parts_keep_the_order_and_miss_nothing():
    train, val = train_val(KEYS, seed=3)
    assert [key for key in KEYS if key in set(train)] == list(train)
    assert [key for key in KEYS if key in set(val)] == list(val)
    assert sorted(train + val) == sorted(KEYS)


def test_the_choice_is_the_lowest_hashes():
    """The rule itself, so that another version of pcd cannot silently choose otherwise."""
    ranked = sorted(KEYS, key=lambda key: hashlib.sha256(b"7\x00" + key.encode()).hexdigest())
    assert set(train_val(KEYS, seed=7)[1]) == set(ranked[:10])


def test_neither_order_nor_unrelated_keys_matter():
    mixed = list(KEYS)
    random.Random(1).shuffle(mixed)
    assert set(train_val(mixed, seed=5)[1]) == set(train_val(KEYS, seed=5)[1])
    assert set(train_val(KEYS, seed=5)[1]) != set(train_val(KEYS, seed=6)[1])


def test_groups_stay_whole():
    train, val = train_val(KEYS, seed=1, fraction=0.2, groups=SCENES)
    assert {SCENES[key] for key in train} & {SCENES[key] for key in val} == set()
    assert len(val) in {13, 20, 23}


def test_a_dominant_group_is_not_held_out_whole():
    groups = {f"big/{i}": "big" for i in range(80)} | {f"s{i}/{j}": f"s{i}" for i in range(20) for j in range(4)}
    for seed in range(20):
        _, val = train_val(list(groups), seed, 0.1, groups)
        assert "big" not in {groups[key] for key in val}
        assert len(val) == 16


def test_the_smallest_group_if_all_are_too_big():
    groups = {f"a{i}": "a" for i in range(9)} | {f"b{i}": "b" for i in range(8)}
    for seed in range(5):
        assert {groups[key] for key in train_val(list(groups), seed, 0.1, groups)[1]} == {"b"}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=25), st.integers(0, 99), st.floats(0.01, 0.99))
def test_both_sides_have_something(scenes, seed, fraction):
    groups = {f"k{i}": str(scene) for i, scene in enumerate(scenes)}
    train, val = train_val(list(groups), seed, fraction)
    assert train
    assert val
    if len(set(scenes)) > 1:
        train, val = train_val(list(groups), seed, fraction, groups)
        assert train
        assert val
        assert not {groups[key] for key in train} & {groups[key] for key in val}


def test_nothing_is_held_out_with_fraction_zero():
    assert train_val(KEYS, 0, 0.0) == (tuple(KEYS), ())
    assert last_part(KEYS, 0.0) == (tuple(KEYS), ())


def test_wrong_input():
    with pytest.raises(UsageError, match=r"fraction of 1\.0"):
        train_val(KEYS, 0, 1.0)
    with pytest.raises(UsageError, match="1 keys occur more than once, the first is 'a'"):
        train_val(["a", "b", "a"], 0)
    with pytest.raises(UsageError, match="'b' has no group"):
        train_val(["a", "b"], 0, groups={"a": "x"})
    with pytest.raises(UsageError, match="all samples are of the group 'x'"):
        train_val(["a", "b"], 0, groups={"a": "x", "b": "x"})
    with pytest.raises(UsageError, match="'b' has no group"):
        last_part(["a", "b"], 0.5, {"a": "x"})


def test_the_end_of_a_sequence():
    assert last_part(list("abcdefghij"), 0.2) == (tuple("abcdefgh"), tuple("ij"))
    assert last_part(["a"], 0.5) == (("a",), ())


def test_the_end_of_each_group():
    keys = ["a0", "b0", "a1", "b1", "a2", "b2", "a3", "c0"]
    groups = {key: key[0] for key in keys}
    assert last_part(keys, 0.25, groups) == (("a0", "b0", "a1", "b1", "a2", "c0"), ("b2", "a3"))
