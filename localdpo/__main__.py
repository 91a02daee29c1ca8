"""`python -m localdpo`."""

from localdpo.cli import main

main()
