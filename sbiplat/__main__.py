"""`python -m sbiplat`: the same as the command `sbiplat`."""

from sbiplat.cli import main

if __name__ == "__main__":
    main()
