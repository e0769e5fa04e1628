"""The command line: arguments, Hydra, error messages and sweeps."""
