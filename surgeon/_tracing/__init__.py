"""What a model does, seen from outside: one run recorded, one graph per block."""
