"""`python -m dreamsr_cli` is the command `dreamsr`."""

from dreamsr_cli.cli.app import main

if __name__ == "__main__":
    main()
