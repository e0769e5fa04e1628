"""Where Python looks for modules. This module imports nothing that a file could replace."""

import os
import sys


def forget_current_folder() -> None:
    """Remove the current folder from `sys.path`: files in it could replace modules or be loaded as plugins.

    `python -m metarun` puts it there, and so does an empty entry in PYTHONPATH, as in `/folder:`. It stays if
    PYTHONPATH names it, or if metarun itself is in it, as in a checkout.
    """
    here = os.getcwd()
    named = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    checkout = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    if here not in (checkout, *map(os.path.abspath, named)):
        sys.path[:] = [folder for folder in sys.path if folder not in ("", here)]
