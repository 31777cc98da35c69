"""A part of an extraction: every N-th range of samples, for job arrays that have no scheduler."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from pcd.errors import UsageError

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """Part `number`, from 1, of `total`."""

    number: int
    total: int

    @staticmethod
    def parse(text: str) -> Part:
        """`2/5` as a part. Raises `UsageError`."""
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        part = Part(int(found[1]), int(found[2])) if found else None
        if part is None or not 1 <= part.number <= part.total:
            raise UsageError(f"--part {text}: expected I/N with I from 1 to N, for example --part 2/5.")
        return part

    @property
    def name(self) -> str:
        """The part in a file name."""
        return f"{self.number}-of-{self.total}"

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"

    def of(self, items: Sequence[T]) -> list[T]:
        """Its share of the items: what is done already must be among them, so that all parts count alike."""
        return list(items[self.number - 1 :: self.total])
