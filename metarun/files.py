from metarun.datasets.files import *  # noqa
