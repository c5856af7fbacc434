"""Subsets of a scenario's prompts: two parts for held-out evaluation, and names matched by their length in tokens.

Here belongs the choice of prompts; what is done with the answers of the chosen ones is `evaluation` and `comparisons`.
A mask made from a name's answers may fit that very name, so masks and judgement can use different names, or templates
where groups have few descriptors (FASP, section 4, has a validation and a test part). One group's names may also be
longer in tokens than the other's (method, A3): a matched subset rules that out as a gap's cause.
"""

import hashlib

import polars as pl

from excise.errors import ExciseError
from excise.scenarios.holistic_bias_groups import VALIDATION, subgroup_sentences
from excise.scenarios.schema import Scenario

ATTRIBUTION, EVALUATION, BOTH = "attribution", "evaluation", "both"
"""Values of the column `split`: what masks are made from, what they are judged on, and both if nothing is held out."""
SPLIT_SCHEMA = {"group": pl.String, "subject": pl.String, "split": pl.String}


def held_out_split(scenario: Scenario, prompts: pl.DataFrame, seed: int) -> pl.DataFrame:
    """Which prompts masks are made from and which they are judged on: frame with prompt_id and split, as `prompts`.

    prompts: all or some rows of `expand(scenario)`. Where two groups are compared, their names are halved (`halves`);
    where all of an axis are, the templates are (`template_halves`), so that both parts have every
    group and descriptor. Sentences of HolisticBias keep the data set's own split, which `holistic_bias.seed` draws and
    not `seed`: masks are made from its validation part and judged on its test part.

    Raises ExciseError where a part would be empty, for a group or for a group in one of the variations.
    """
    if scenario.holistic_bias is not None:
        sentences = subgroup_sentences(scenario.holistic_bias, scenario.groups)
        part = pl.when(split=VALIDATION).then(pl.lit(ATTRIBUTION)).otherwise(pl.lit(EVALUATION))
        keys, parts = ["group", "subject", "text"], sentences.with_columns(split=part)
        mend = "raise holistic_bias.per_subgroup, or the number of subjects"
    elif not scenario.outcome.pairwise:
        keys, parts = ["template"], template_halves(prompts, seed)
        mend = "give every variation two templates at least, or turn holding out off"
    else:
        keys, parts = ["group", "subject"], halves(prompts, seed)
        mend = "give every group two names at least, or turn holding out off"
    split = prompts.join(parts.select(*keys, "split"), on=keys, how="left", maintain_order="left")
    if split["split"].null_count():
        raise ExciseError(
            f"scenario {scenario.key}: {split['split'].null_count()} of its prompts are not sentences that its file "
            "asks for: expand it anew"
        )
    counts = split.group_by("variation", "group", maintain_order=True).agg(pl.col("split").unique())
    for variation, group, names_of_parts in counts.iter_rows():
        if len(names_of_parts) < 2:
            raise ExciseError(
                f"scenario {scenario.key}: all prompts of variation {variation} about group {group} fall into the part "
                f"{names_of_parts[0]!r} of what is held out: {mend}"
            )
    return split.select("prompt_id", "split")


def without(split: str, completions: pl.DataFrame, prompts: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The completions, and their prompts, of all names but those of one half.

    Without `EVALUATION` they are what masks are made from, without `ATTRIBUTION` what masks are judged on.
    """
    rows = completions.filter(pl.col("split") != split)
    return rows, prompts.filter(pl.col("prompt_id").is_in(rows["prompt_id"].unique().implode()))


def template_halves(prompts: pl.DataFrame, seed: int) -> pl.DataFrame:
    """The templates in two halves: frame with template and split ("attribution" or "evaluation"), by template.

    prompts: the table of that name; only its distinct templates matter, so axes with the same templates have the same
    halves. All groups share the templates, hence both halves have every group and every descriptor. An odd template
    goes to the evaluation.

    Raises ExciseError for fewer than two templates: one half would be empty.
    """
    templates = prompts["template"].unique().sort().to_list()
    if len(templates) < 2:
        raise ExciseError(
            f"there is one template only, {templates}: held-out templates need two, or turn holding out off"
        )
    order = sorted(templates, key=lambda template: _lot(seed, "template", template))
    rows = [(template, ATTRIBUTION if place % 2 else EVALUATION) for place, template in enumerate(order)]
    return pl.DataFrame(rows, schema={"template": pl.String, "split": pl.String}, orient="row").sort("template")


def halves(prompts: pl.DataFrame, seed: int) -> pl.DataFrame:
    """Each group's names in two halves: frame with group, subject and split ("attribution" or "evaluation").

    prompts: the table of that name (group, subject, gender); only its distinct names matter, so every scenario with the
    same subjects gets the same halves, whatever its variations. Genders are balanced: the halves of a group differ by
    one name at most, in every gender and altogether, and an odd name goes to the evaluation. Ordered by group and name.

    Raises ExciseError for a group of fewer than two names: one of its halves would be empty.
    """
    names = prompts.select("group", "subject", "gender").unique(["group", "subject"]).sort("group", "subject")
    rows = []
    for (group,), members in names.partition_by("group", as_dict=True, maintain_order=True).items():
        if len(members) < 2:
            raise ExciseError(
                f"group {group!r} has one name only: held-out names need two in each group, or turn held-out names off"
            )
        order = sorted(
            zip(members["gender"].fill_null(""), members["subject"], strict=True),
            key=lambda name: (name[0], _lot(seed, group, name[1])),
        )
        rows += [(group, subject, ATTRIBUTION if place % 2 else EVALUATION) for place, (_, subject) in enumerate(order)]
    return pl.DataFrame(rows, schema=SPLIT_SCHEMA, orient="row").sort("group", "subject")


def first_names(prompts: pl.DataFrame, count: int) -> pl.DataFrame:
    """The rows of each group's first `count` names, genders taking turns as in `expand`; all of a group that has fewer.

    prompts: rows of `expand`, or of a half of its names. The order of rows is kept.
    """
    names = prompts.select("group", "subject", "gender").unique(["group", "subject"], keep="first", maintain_order=True)
    kept = []
    for members in names.partition_by("group", maintain_order=True):
        genders = members["gender"].unique(maintain_order=True).to_list()
        turns, order = dict.fromkeys(genders, 0), []
        for place, (group, subject, gender) in enumerate(members.iter_rows()):
            turns[gender] += 1
            order.append((turns[gender], genders.index(gender), place, group, subject))
        kept += [name[3:] for name in sorted(order)[:count]]
    chosen = pl.DataFrame(kept, schema={"group": pl.String, "subject": pl.String}, orient="row")
    return prompts.join(chosen, on=["group", "subject"], how="semi", maintain_order="left")


def token_matched(completions: pl.DataFrame) -> set[str]:
    """The largest set of names with equally many names of every group for every number of name tokens (method, A3).

    completions: group, subject and name_tokens; all groups in it are matched. A name counts as long as it is in its
    prompts: where it has different numbers of tokens in different prompts, it is matched with names that have the same.
    Names without a number of tokens are left out. Which names of a too large group are kept does not depend on their
    alphabetical order. Empty where no length is shared.
    """
    lengths = (
        completions.drop_nulls("name_tokens")
        .group_by("group", "subject")
        .agg(pl.col("name_tokens").unique().sort().alias("lengths"))
        .sort("group", "subject")
    )
    groups = completions["group"].unique().to_list()
    by_length: dict[tuple[int, ...], dict[str, list[str]]] = {}
    for group, subject, length in lengths.iter_rows():
        by_length.setdefault(tuple(length), {}).setdefault(group, []).append(subject)
    chosen: set[str] = set()
    for by_group in by_length.values():
        count = min(len(by_group.get(group, ())) for group in groups)
        for group, subjects in by_group.items():
            chosen.update(sorted(subjects, key=lambda subject: _lot(0, group, subject))[:count])
    return chosen


def _lot(seed: int, group: str, subject: str) -> bytes:
    """A name's place in a random order that depends on nothing but the seed, its group and itself."""
    return hashlib.sha256(f"{int(seed)}|{group}|{subject}".encode()).digest()
