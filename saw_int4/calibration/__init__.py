"""Calibrated key transforms: collect statistics, fit mu and s per (layer, KV head, channel), keep them in one file.

The transform is exact in real arithmetic, and decode applies it to queries alone (``K' = H_R((K - mu) / s)``,
``q' = H_R(q * s)``), so that calibration decides only how well four bits hold the keys, never what the model computes.
"""
