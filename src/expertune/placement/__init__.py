"""Where a run computes, and where frozen expert bytes are held."""

from typing import Literal

Location = Literal["device", "host", "disk"]
"""Where an experts module's packed bytes are held."""

# What is mapped at once of a layer on disk while a CPU reads it ahead.
READ_BYTES = 32 * 2**20
