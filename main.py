"""Runs the command line: python main.py --config=configs/digits_lakd.py."""

from lakd_jax import cli

if __name__ == "__main__":
    cli.main()
