"""Answers: in batches, or one at a time as they come."""
