"""One network, from the parts of a recipe to a file."""
