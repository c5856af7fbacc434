"""`python -m excise.planted NAME`: trains a planted model's low-rank change again."""

from excise.planted import main

main()
