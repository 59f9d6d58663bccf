"""Where a run computes, and where frozen expert bytes are held."""
