"""The table on disk: manifest, columns, shards and commit records."""
