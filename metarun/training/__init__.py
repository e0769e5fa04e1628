"""The outer loop, evaluation, checkpoints and the hardware they run on."""
