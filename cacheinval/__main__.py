"""`python -m cacheinval` is the command `cacheinval`."""

from cacheinval.cli import main

if __name__ == "__main__":
    main()
