"""Typed settings, their checks, and the objects they describe."""
