"""Experts: recognize them by contract, route rows to them, hold them as NF4, adapt each of them."""
