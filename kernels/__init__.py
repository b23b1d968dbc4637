"""Triton kernels, one op a file: kernels first, then the launchers that the backend "triton" calls.

Imported when that backend first runs, so that ``import bqnn`` needs no Triton.
"""
