"""Backbones: networks from one example to a vector of `features`, written for one task.

A backbone is any nn.Module built with `item_shape`, mapping [B, *item] to [B, features], with
an int attribute `features`. One that is an nn.Sequential of plain layers is run on many tasks
at once in the fastest way (metarun.nn.per_task).
"""
