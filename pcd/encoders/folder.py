"""The `folder` encoder: columns that somebody else's code has computed, from files by sample key.

    pcd extract ... --encoder folder --weights DIR/columns.json     all columns of that file; encoder.columns says which

`pcd.encoders.folder_files` says what is in such a folder and writes one. The fingerprint holds what `columns.json` says, the
fingerprints given there included, and name and size of each file; their contents are not digested. There is no network: new
images cannot be predicted. With the option `prefix`, columns `sam/segments` are called `PREFIX/segments`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pcd.columns import ColumnSpec
from pcd.encoders.base import EncoderOptions
from pcd.encoders.folder_files import INDEX, Array, Index, StoredArrays, cell_of, digest_of, fault_of, read_index
from pcd.errors import DatasetError, TextTowerError, UsageError
from pcd.views import ViewPlan, to_views

if TYPE_CHECKING:
    import torch

    from pcd.encoders.base import RowKey


class FolderOptions(EncoderOptions):
    """`weights` is the path of a `columns.json`; seed and precision mean nothing here."""

    columns: tuple[str, ...] = ()
    """Those of its columns that are taken; absent: all."""


class FolderEncoder:
    """Arrays from files as columns; see `pcd.encoders.base.Encoder` and `Keyed` for the interface.

    Construction raises `UsageError` without a path, `MissingFileError` and `DatasetError` for files that cannot be used.
    """

    Options = FolderOptions
    has_text = False
    random_weights = False

    def __init__(self, model: str, options: FolderOptions, view_size: tuple[int, int], device: str) -> None:
        file = _index_file(model, options)
        self._index = read_index(file, options.columns)
        self._digest = digest_of(self._index, file.parent)
        self.view_size = view_size
        self.grid = self._index.grid
        self._arrays = {name: StoredArrays(file.parent, name, column) for name, column in self._index.columns.items()}
        self._called = {name: _called(name, options.prefix) for name in self._index.columns}
        self._kept: dict[str, tuple[str, Array]] = {}
        self.columns = tuple(
            ColumnSpec(self._called[name], c.shape, c.dtype, c.dims, c.meaning, compress=c.compress)
            for name, c in self._index.columns.items()
        )

    @staticmethod
    def request(model: str, options: FolderOptions) -> dict[str, Any]:
        """What was asked for, without paths: the digest of `columns.json` and of the list of files. Raises as construction."""
        file = _index_file(model, options)
        index = read_index(file, options.columns)
        asked = {"model": index.model, "columns": list(index.columns), "prefix": options.prefix}
        return {**asked, "digest": digest_of(index, file.parent)}

    def fingerprint(self) -> dict[str, Any]:
        """What determines the columns, as far as it was stated: `columns` holds the fingerprint given for each."""
        return {
            "encoder": "folder",
            "model": self._index.model,
            "weights": {"kind": "file", "digest": self._digest},
            "precision": "as stored",
            "view_size": list(self.view_size),
            "grid": list(self.grid),
            "text": False,
            "columns": {
                name: {"views": column.views, "fingerprint": column.fingerprint} for name, column in self._index.columns.items()
            },
        }

    def encode(self, views: torch.Tensor) -> dict[str, torch.Tensor]:
        """Raises `UsageError`: pixels alone do not say which sample they are."""
        raise UsageError(
            f"the columns of encoder folder ({self._index.model}) come from files, which exist for the samples they were "
            f"computed for; other images cannot be predicted with it. Compute {', '.join(self._called.values())} for them and "
            "extract them as a dataset, or train on an encoder that pcd can run."
        )

    def encode_rows(self, views: torch.Tensor, rows: Sequence[RowKey]) -> dict[str, torch.Tensor]:
        """The columns of these rows: see `pcd.encoders.base.Keyed`. The pixels are not looked at.

        Raises `MissingFileError` for a sample without a file, and `DatasetError` for an array of another shape or dtype than
        `columns.json` says, with NaN or infinity, or for another number of views.
        """
        import torch

        return {
            called: torch.from_numpy(np.stack([self._row(name, row) for row in rows])) for name, called in self._called.items()
        }

    def embed_text(self, phrases: Sequence[str]) -> torch.Tensor:
        """Raises `TextTowerError`: files hold no text tower."""
        raise TextTowerError('encoder folder has no text tower. Set head.table_init to "tokens" or "random".')

    def _row(self, name: str, row: RowKey) -> Array:
        """One row of a column; the array of a sample is kept for its other views."""
        key = f"{row.split}/{row.sample}"
        if self._kept.get(name, ("",))[0] != key:
            self._kept[name] = (key, self._views(name, row.sample, row.plan))
        return np.asarray(self._kept[name][1][row.number])

    def _views(self, name: str, sample: str, plan: ViewPlan) -> Array:
        """All views of a sample, `(views, *shape)`."""
        arrays, column = self._arrays[name], self._index.columns[name]
        array, cell = arrays.load(sample), cell_of(column, self.grid)
        whole = (plan.grid[0] * cell[0], plan.grid[1] * cell[1], *cell[2:]) if column.views == "canvas" else ()
        if fault := fault_of(array, column, self.grid, whole or (plan.views, *column.shape)):
            raise DatasetError(f"{arrays.place}, sample {sample!r}, column {name}: {fault}")
        return to_views(array, plan).reshape(plan.views, *column.shape) if column.views == "canvas" else array


def _index_file(model: str, options: FolderOptions) -> Path:
    if model:
        raise UsageError(f"encoder folder:{model}: the path goes elsewhere: --encoder folder --weights DIR/{INDEX}.")
    if options.weights in ("auto", "random"):
        raise UsageError(f"encoder folder: say where the columns are with --weights DIR/{INDEX} (encoder.weights in a recipe).")
    path = Path(options.weights).expanduser()
    return path / INDEX if path.is_dir() else path


def _called(name: str, prefix: str) -> str:
    return f"{prefix}/{name.partition('/')[2]}" if prefix else name


__all__ = ["FolderEncoder", "FolderOptions", "Index"]
