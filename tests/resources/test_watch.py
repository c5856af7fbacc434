"""Long work leaves milestones in the run's log, not a line per unit, and observations of the asset."""

import re

import dagster as dg

from resources.watch import RunWatch


def run(interval: float):
    @dg.asset
    def thing(context: dg.AssetExecutionContext, watch: RunWatch):
        progress = watch.progress(context)
        for done in range(101):
            progress("sampling", done, 100)

    instance = dg.DagsterInstance.ephemeral()
    result = dg.materialize([thing], instance=instance, resources={"watch": RunWatch(interval=interval)})
    messages = [entry.user_message for entry in instance.all_logs(result.run_id)]
    logs = [message for message in messages if message.startswith("sampling")]
    return logs, result.asset_observations_for_node("thing")


def test_milestones_are_throttled_and_the_end_is_told():
    logs, observations = run(interval=3600)
    assert len(logs) == 2
    assert logs[0] == "sampling: 100 to do"
    assert re.fullmatch(r"sampling 100/100, [\d,]+/s, 1 s in all", logs[1])
    assert observations == []


def test_milestones_are_observations_with_numbers():
    logs, observations = run(interval=0)
    assert len(logs) == 101
    assert len(observations) == 99
    assert observations[0].metadata["total"].value == 100
    assert {"done", "seconds_left", "per_second"} <= observations[0].metadata.keys()
