"""`python -m epsball`, and `torchrun -m epsball`: the command line."""

from epsball.cli import main

if __name__ == "__main__":
    main()
