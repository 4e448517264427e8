"""`python -m rdeploy`: the command line."""

from rdeploy.cli import main

main()
