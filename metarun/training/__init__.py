"""The outer loop, evaluation, checkpoints and hardware settings."""
