"""The command bqnn."""
