"""``python -m surgeon`` is the command line."""

from surgeon.cli.main import main

if __name__ == "__main__":
    main()
