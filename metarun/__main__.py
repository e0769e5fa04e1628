"""`python -m metarun`, the same as `metarun`."""

from metarun.cli.main import main

if __name__ == "__main__":
    main()
