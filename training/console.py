"""What is said to the user: lines on the console, and the one exception for user mistakes."""

import os
import sys


class UserError(Exception):
    """One line that says what was wrong and what would be right; the scripts exit with code 2."""


class DataError(UserError):
    """Data that are missing, broken or not laid out as they should be, said in one line."""


class BadImages(DataError):
    """All images of a split that can't be read."""


def say(*words, file=None):
    """Print a line, ignoring a closed pipe (`| head`)."""
    file = file or sys.stdout
    try:
        # One write, so that lines of several processes don't mix.
        print(' '.join(map(str, words)) + '\n', end='', file=file, flush=True)
    except OSError:
        with open(os.devnull, 'w') as devnull:  # or Python would fail again at its exit
            os.dup2(devnull.fileno(), file.fileno())


def warn(message, kind='warning', script='train.py'):
    """Print one line on stderr; line breaks and the like, as in file names, are escaped."""
    line = ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in str(message))
    say(f'{script}: {kind}: {line}', file=sys.stderr)


def exit_on_user_error(function, script):
    """`function()`; a UserError becomes one line on stderr and exit code 2."""
    try:
        return function()
    except UserError as error:
        warn(error, 'error', script)
        sys.exit(2)
