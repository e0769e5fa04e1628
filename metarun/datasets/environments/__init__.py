"""Environments: tasks in which a policy acts, and learns from what it gets."""
