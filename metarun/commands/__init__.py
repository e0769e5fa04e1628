"""The commands, each a recipe: build, run, report."""
