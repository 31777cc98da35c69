"""Reports: figures and one self-contained page, from plain data. Knows nothing of runs, caches or stages."""
