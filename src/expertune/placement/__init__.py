"""Placement: where frozen bytes and products live."""
