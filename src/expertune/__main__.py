"""`python -m expertune` is the command line."""

from expertune.cli import main

if __name__ == "__main__":
    main()
