"""Backbones: networks that map examples to feature vectors, written as for a single task.

A backbone is any `nn.Module` whose constructor takes `item_shape`, which maps [B, *item] to [B, features]
and has an int attribute `features`. An `nn.Sequential` of plain layers is run on many tasks at once by the
fastest of the methods in metarun.nn.per_task.
"""
