"""What methods are made of: their interface, terms, adapters, numerics."""
