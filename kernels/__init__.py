"""Triton kernels, one op a file: kernels first, then the launchers that the backend "triton" calls.

All but ``arguments`` are imported when that backend first runs, so that ``import bqnn`` needs no Triton.
"""
