"""The one error type for mistakes a user can mend. Messages name the file, the field and the mend."""


class ExciseError(ValueError):
    """A mistake in the user's files, settings or surroundings. Nothing computed so far is lost."""
