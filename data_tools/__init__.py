"""Tools that make, check and describe shards: the command ``keye-data``."""
