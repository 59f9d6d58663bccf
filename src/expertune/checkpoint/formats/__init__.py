"""Formats that checkpoints hold packed weights in: one module each, and none knows another.

To read one more, write a module with the names of `interface.Format`, and add it to `expertune.checkpoint.recipe`.
"""
