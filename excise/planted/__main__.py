"""`python -m excise.planted NAME`: trains a planted model's low-rank change again, `heads` among them; with `plant` in
place of a name, a gap of one's own choosing."""

import sys

from excise.planted import command, heads
from excise.planted.gaps import main

try:
    if sys.argv[1:2] == ["heads"]:
        heads.main(sys.argv[2:])
    elif sys.argv[1:2] == ["plant"]:
        command.main(sys.argv[2:])
    else:
        main()
except KeyboardInterrupt:
    print("Stopped. Nothing was written: training begins anew the next time.", file=sys.stderr)
    sys.exit(130)
