"""Console output, and the exceptions for user mistakes."""

import contextlib
import os
import sys
import textwrap


class UserError(Exception):
    """A user mistake: one line with what was wrong and what would be right; exit code 2."""


class DataError(UserError):
    """Data that are missing, broken or have another layout."""


class BadImages(DataError):
    """Images of a split that can't be read."""


@contextlib.contextmanager
def explain_errors(what):
    """Turn any error into a UserError: what failed, and the beginning of the error's message."""
    try:
        yield
    except Exception as error:  # libraries raise any exception for a damaged file
        reason = textwrap.shorten(str(error), 250) or type(error).__name__
        raise UserError(f'{what}: {reason}') from error


def say(*words, file=None):
    """Print a line, ignoring a closed pipe (`| head`)."""
    file = file or sys.stdout
    try:
        # A single write, so that lines of several processes do not mix.
        print(' '.join(map(str, words)) + '\n', end='', file=file, flush=True)
    except OSError:
        with open(os.devnull, 'w') as devnull:  # or Python would raise again at exit
            os.dup2(devnull.fileno(), file.fileno())


def warn(message, kind='warning', script='train.py'):
    """Print one line on stderr, with unprintable characters, as in file names, escaped."""
    line = ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in str(message))
    say(f'{script}: {kind}: {line}', file=sys.stderr)


def exit_on_user_error(function, script):
    """Call `function`; print a UserError or OSError on stderr and exit with code 2."""
    try:
        return function()
    except (UserError, OSError) as error:
        warn(error, 'error', script)
        sys.exit(2)
