"""The table on disk: manifest, columns, shards and commit records."""

from pcd.cache.column import Column
from pcd.cache.manifest import ColumnEntry, Manifest, TableEntry
from pcd.cache.store import Cache
from pcd.cache.table import Table

__all__ = ["Cache", "Column", "ColumnEntry", "Manifest", "Table", "TableEntry"]
