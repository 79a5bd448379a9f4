"""Triton kernels and their launchers, one file an op; imported at the first call that needs them.

Every kernel here keeps three promises. A row's result never depends on the other rows: tiles and
splits have fixed lengths, partial results are merged in order, nothing is added atomically.
Lengths are read on the device: no launcher waits for it. Sizes that follow the batch are plain
arguments, never compile-time constants.
"""
