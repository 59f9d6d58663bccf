"""Benchmarks: one runner, peers in processes of their own, JSON results."""
