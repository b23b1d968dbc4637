"""What each ATen operator is in the engine's graph; bqnn.engine.lower reads the tables."""
