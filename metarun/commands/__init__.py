"""The commands. Each builds its objects from the config, runs, and reports results."""
