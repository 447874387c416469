"""`python -m stepflow_tl`: the command line."""

from stepflow_tl.cli.main import main

if __name__ == "__main__":  # a spawned worker imports this module again
    raise SystemExit(main())
