"""Random controls in the warehouse: recipes now, files in one from an earlier version, which is read as it is."""

import duckdb
import polars as pl

from excise.interventions.kinds import load_mask, recalled


def random_controls(house) -> pl.DataFrame:
    return house.warehouse.read("masks").filter(pl.col("strategy") == "random")


def test_a_random_control_is_a_row_and_no_file(audited):
    house, _ = audited
    controls = random_controls(house)
    assert controls["control_seed"].null_count() == 0
    others = house.warehouse.read("masks").filter(pl.col("strategy") != "random")
    assert others["control_seed"].null_count() == others.height > 0
    names = {path.stem for path in (house.data / "artifacts" / "masks").iterdir()}
    assert names == set(others["mask"])
    place = ["variation", "level", "matched_to", "draw", "mask", "path", "control_seed"]
    for (*_, mask, path, seed), counts in controls.group_by(place):
        control = recalled(house.data / path, seed, mask).mask
        assert control.fingerprint == mask
        told = {f"{layer}.{role}": pruned for layer, role, pruned in counts.select("layer", "role", "pruned").rows()}
        assert control.counts() == load_mask(house.data / path).counts() == told


def test_a_warehouse_whose_random_controls_are_files_is_read_as_it_is(copied):
    house, before = copied, {}
    for table in ("pruned_completions", "side_effects", "perplexity"):
        before[table] = house.warehouse.read(table)
    controls = random_controls(house).select("mask", "path", "control_seed").unique()
    for mask, path, seed in controls.rows():
        recalled(house.data / path, seed, mask).mask.save(house.data / "artifacts" / "masks" / f"{mask}.safetensors")
    with duckdb.connect(house.warehouse.path) as connection:
        connection.execute("alter table masks drop column control_seed")
        connection.execute("update masks set path = 'artifacts/masks/' || mask || '.safetensors'")
    assert random_controls(house)["control_seed"].null_count() == random_controls(house).height > 0
    result = house.run("audit_scenario", "tiny|lamp", only=["pruned_completions", "side_effects"])
    assert result.success
    drawn = {
        event.asset_key.to_user_string(): event.materialization.metadata["completions_drawn"].value
        for event in result.get_asset_materialization_events()
    }
    assert drawn == {"pruned_completions": 0, "side_effects": 0}
    for table, rows in before.items():
        assert house.warehouse.read(table).equals(rows), table
