"""`python -m basestone.launch` is `basestone`."""

from .cli import main

if __name__ == "__main__":
    main()
