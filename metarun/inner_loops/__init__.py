"""Inner loops: the rules by which a task's own weights follow its loss."""
