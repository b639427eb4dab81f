"""Triton kernels: codecs (arithmetic), tiles (addresses), and one kernel family each for fill, flatten and decode."""
