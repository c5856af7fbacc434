"""What Dagster loads: the definitions, the jobs, the presets, and the demo that runs a job from a terminal."""
