"""`python -m aerogel` is `aerogel`."""

from aerogel.cli import main

main()
