"""How much the preflight check and the first factors of an adapter compute: what a plan counts of this room."""

# Tokens of the check's batch: enough for every expert of a layer to be reached, few enough to cost a second.
PREFLIGHT_TOKENS = 512

# Of a matrix whose smaller side is at most this, all singular values are computed; of a larger one the largest, by
# iterating on a subspace with so many columns more than are wanted (Halko et al. 2011).
EXACT_SIDE = 512
EXTRA_COLUMNS = 16
