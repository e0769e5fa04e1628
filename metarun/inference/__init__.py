"""Trained models in use, by the commands and by programs: restored, adapted to new tasks, saved, exported."""
