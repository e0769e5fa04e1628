"""Inner loops: update rules that adapt the weights of each task to its loss."""
