"""How good a model is on its evaluation examples."""
