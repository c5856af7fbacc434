"""Types of the fields that files hold: texts, keys, numbers and counts, none of which a truth value may stand for.

Not here: which fields an entry has and what they mean (whoever reads it).
"""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, StringConstraints

KEY_PATTERN = "^[a-z0-9][a-z0-9_-]*$"


def no_truth_value(value: Any) -> Any:
    """The value itself. Raises ValueError for true and false, which Python and pydantic take for 1 and 0."""
    if value is True or value is False:
        raise ValueError(f"is {str(value).lower()}, not a number")
    return value


Key = Annotated[str, StringConstraints(pattern=KEY_PATTERN)]
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Number = Annotated[float, BeforeValidator(no_truth_value), Field(allow_inf_nan=False)]
TokenCount = Annotated[int, BeforeValidator(no_truth_value), Field(ge=1)]
Count = Annotated[int, BeforeValidator(no_truth_value), Field(ge=0)]
