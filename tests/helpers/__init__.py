"""What several test modules share: methods and their references, data, runs, a server."""
