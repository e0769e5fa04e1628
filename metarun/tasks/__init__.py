"""What a method learns from: batches of tasks, their objectives, and the sources they are drawn from."""
