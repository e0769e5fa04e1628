"""`python -m metarun`, the same as `metarun`."""

from metarun.cli.search_path import forget_current_folder

if __name__ == "__main__":
    forget_current_folder()  # before anything else is imported
    from metarun.cli.main import main

    main()
