"""What Dagster loads: the definitions, the jobs, the presets, and the commands that run jobs from a terminal."""

import sys

# So that Ctrl-C is answered in one line while `python -m pipelines.demo` imports what the command needs, too.
if sys.argv[:1] == ["-m"]:
    from pipelines.terminal import listen

    listen()
