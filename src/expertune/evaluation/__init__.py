"""A model held to its evaluation examples."""
