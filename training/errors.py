"""The one exception for what a user can put right."""


class UserError(Exception):
    """What was wrong and what would be right, in one line; the scripts exit with code 2."""
