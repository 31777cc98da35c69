"""pcd: train and compare depth heads on frozen encoders, from a cache that is written once."""

__version__ = "0.1.0"
