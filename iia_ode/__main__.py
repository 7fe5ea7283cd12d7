"""``python -m iia_ode`` is the command line."""

from .cli import main

main()
