"""Meta-learning algorithms, one module for each method or family of close variants."""
