"""Train: transformers' Trainer with checkpoints that are whole or absent, exact resume, and a record of every step."""
