"""Where entries are kept: aiocache backends, and the eviction of caches that belong to others."""
