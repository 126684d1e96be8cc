"""`python -m tfinfer` is the command `tfinfer`."""

from tfinfer.cli.main import main

if __name__ == "__main__":
    main()
