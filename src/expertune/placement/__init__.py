"""Where a run computes, and where frozen expert bytes are held."""

from typing import Literal

Location = Literal["device", "host", "disk"]
"""Where an experts module's packed bytes are held."""
