"""Compiled kernels for CPUs, each with its NumPy twin; README.md is the guide.

Importing this package loads nothing: `cache` must be usable before Numba is, and its modules
import Numba where they need it.
"""
