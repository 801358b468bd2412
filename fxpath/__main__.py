"""`python -m fxpath`, which `torchrun -m fxpath` needs."""

from .cli import main

if __name__ == "__main__":
    main()
