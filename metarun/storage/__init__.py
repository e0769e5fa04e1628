"""Files on disk: atomic writing, locks, downloads, archives, and the cache of decoded data."""
