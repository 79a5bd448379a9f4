"""`python -m tq_fast` is `tq-fast`."""

from .cli.app import main

if __name__ == "__main__":
    main()
