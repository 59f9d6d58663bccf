"""One driver per stack. Each runs in a process of its own, under the interpreter of its stack."""
