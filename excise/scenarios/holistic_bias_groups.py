"""The subgroups of an axis of HolisticBias, and the choice of sentences that makes the axis a scenario.

Its use as prompts is FASP, section 4 (method B2). How the sentences are made is in `excise.scenarios.holistic_bias`.
"""

import difflib
import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import polars as pl

from excise.errors import ExciseError
from excise.scenarios.holistic_bias import holistic_bias, subject_of
from excise.scenarios.holistic_bias_files import NONE, PHRASES, as_phrase, axes_of, check_axis, read_file
from excise.scenarios.schema import Group, HolisticBias, Subject

VALIDATION, TEST = "validation", "test"
VALIDATION_SHARE = 0.2


def subgroups_of(chosen: HolisticBias) -> dict[str, Group]:
    """The subgroups of an axis as the groups of a scenario, their descriptors as subjects.

    Reads descriptors.json alone (and the phrases where `none_bucket` asks for them), so listing scenarios is cheap.
    Raises ExciseError, `field: fault and mend`, for an axis or a descriptor that does not exist, a descriptor in two
    families, and an axis with fewer than two subgroups.
    """
    axes = axes_of(chosen.folder, any_version=chosen.any_version)
    check_axis(chosen.axis, axes)
    buckets = {bucket: list(dict.fromkeys(names)) for bucket, names in axes[chosen.axis].items() if names}
    descriptors = list(dict.fromkeys(name for names in buckets.values() for name in names))
    members: dict[tuple[str, str], Sequence[str]]
    if chosen.subgroups == "bucket":
        keys = _keys(buckets)
        members = {(key, key.replace("_", " ")): buckets[name] for key, name in zip(keys, buckets, strict=True)}
        if chosen.none_bucket:
            entries = read_file(Path(chosen.folder), PHRASES, chosen.any_version).get(chosen.axis, [])
            loose = list(dict.fromkeys(subject_of(as_phrase(entry)) for entry in entries))
            if loose:
                members["none", NONE] = loose
    elif chosen.subgroups == "descriptor":
        members = {(key, name): [name] for key, name in zip(_keys(descriptors), descriptors, strict=True)}
    else:
        _check_families(chosen.families or {}, descriptors, chosen.axis)
        members = {(key, key.replace("_", " ")): names for key, names in (chosen.families or {}).items()}
    if len(members) < 2:
        mend = {
            "bucket": "write subgroups: descriptor, or subgroups: family with families",
            "family": "name at least two families",
            "descriptor": "choose another axis",
        }[chosen.subgroups]
        raise ExciseError(
            f"axis: {chosen.axis} has {len(members)} subgroup{'' if len(members) == 1 else 's'} by {chosen.subgroups}, "
            f"and a bias needs two to differ: {mend}"
        )
    return {
        key: Group(label=label, subjects=tuple(Subject(name=name) for name in names))
        for (key, label), names in members.items()
    }


def subgroup_sentences(chosen: HolisticBias, groups: Mapping[str, Group]) -> pl.DataFrame:
    """The chosen sentences of every subgroup, with the split the paper has: 20 % validation, 80 % test.

    groups: those of `subgroups_of`. Returns group, subject (a descriptor), template, text, name_start, name_end and
    split ("validation" or "test"), ordered by template, group and subject. A sentence that a subgroup has twice counts
    once. The split is drawn within each subgroup, from (seed, text) alone. A cap leaves a subgroup's share of
    validation at 20 %, gives every descriptor about as many sentences, and keeps part of what a larger cap keeps.
    """
    owner = {subject.name: key for key, group in groups.items() for subject in group.subjects}
    sentences = holistic_bias(chosen.folder, axis=chosen.axis, any_version=chosen.any_version)
    if not chosen.none_bucket:
        sentences = sentences.filter(pl.col("bucket") != NONE)
    groups_place = {key: place for place, key in enumerate(groups)}
    subjects_place = {name: place for place, name in enumerate(owner)}
    templates_place = {name: place for place, name in enumerate(sentences["template"].unique(maintain_order=True))}
    kept = (
        sentences.with_columns(subject="descriptor", group=pl.col("descriptor").replace_strict(owner, default=None))
        .drop_nulls("group")
        .unique(["group", "subject", "text"], keep="first", maintain_order=True)
    )
    lots = [hashlib.sha256(f"{chosen.seed}|{text}".encode()).digest()[:8] for text in kept["text"]]
    kept = kept.with_columns(lot=pl.Series([int.from_bytes(lot) for lot in lots], dtype=pl.UInt64))
    place = pl.struct("lot", "text").rank("ordinal").over("group")
    share = (pl.len().over("group") * VALIDATION_SHARE).round().clip(1)
    kept = kept.with_columns(split=pl.when(place <= share).then(pl.lit(VALIDATION)).otherwise(pl.lit(TEST)))
    if chosen.per_subgroup is not None:
        in_validation = max(1, round(chosen.per_subgroup * VALIDATION_SHARE))
        wanted = pl.when(split=VALIDATION).then(in_validation).otherwise(chosen.per_subgroup - in_validation)
        turn = pl.struct("lot", "text").rank("ordinal").over("group", "split", "subject")
        kept = kept.with_columns(turn=turn)
        place_in_split = pl.struct("turn", "lot", "text").rank("ordinal").over("group", "split")
        kept = kept.filter(place_in_split <= wanted)
    return kept.sort(
        pl.col("template").replace_strict(templates_place, return_dtype=pl.Int64),
        pl.col("group").replace_strict(groups_place, return_dtype=pl.Int64),
        pl.col("subject").replace_strict(subjects_place, return_dtype=pl.Int64),
        maintain_order=True,
    ).select("group", "subject", "template", "text", "name_start", "name_end", "split")


def _check_families(families: Mapping[str, Iterable[str]], known: list[str], axis: str) -> None:
    owners: dict[str, str] = {}
    for key, names in families.items():
        for name in names:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
                raise ExciseError(f"families.{key}: the axis {axis} has no descriptor {name!r}; {hint}")
            if name in owners:
                raise ExciseError(f"families.{key} holds {name!r}, which is in families.{owners[name]} too: remove one")
            owners[name] = key


def _keys(names: Iterable[str]) -> list[str]:
    """A key for every name: plain small letters, with a number where two would be alike."""
    keys: list[str] = []
    for name in names:
        plain = unicodedata.normalize("NFKD", name.replace("+", " plus")).encode("ascii", "ignore").decode().lower()
        key = base = re.sub("[^a-z0-9]+", "_", plain).strip("_") or "group"
        count = 1
        while key in keys:
            count += 1
            key = f"{base}_{count}"
        keys.append(key)
    return keys
