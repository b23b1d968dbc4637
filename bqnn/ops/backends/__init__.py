"""What runs the ops: the layouts that each backend makes, and the way from an op's arguments to its kernels."""
