"""A run: its record, its directory, what it reads, and a finished one opened again."""
