"""Meta-learning algorithms, one module a method or a close family."""
