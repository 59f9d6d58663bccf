"""Checkpoints: read one tensor at a time, name it as the live model does, quantize it where it belongs."""
