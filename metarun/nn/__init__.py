"""Networks that are run on many tasks at once."""
