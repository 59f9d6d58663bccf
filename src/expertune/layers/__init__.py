"""Layers beside the experts: dense 4-bit linears, variable-length attention."""
