"""`python -m pcd`."""

from pcd.cli import main

if __name__ == "__main__":
    main()
