"""`python -m excise.planted NAME`: trains a planted model's low-rank change again, `heads` among them."""

import sys

from excise.planted import heads, main

if sys.argv[1:2] == ["heads"]:
    heads.main(sys.argv[2:])
else:
    main()
