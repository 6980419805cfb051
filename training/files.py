"""Files of a run: written whole or not at all; JSON; CSV. No torch."""

import contextlib
import json
import os

from training.console import UserError


@contextlib.contextmanager
def replace_file(path):
    """Yield a temporary path in the same folder, which is renamed to `path` at the end.

    After an error, the temporary file is deleted and `path` is unchanged. An OSError names `path`.
    """
    # With the process ID, because two processes may draw a figure at once.
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # unset if a write fails
        raise


def remove_temporary_files(directory):
    """Delete what killed processes have left of `replace_file`."""
    for path in directory.glob('.*.[0-9]*.tmp'):
        path.unlink()


def write_json(path, content):
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1), encoding='utf-8')


def read_json(path):
    """Raises UserError if the file is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except OSError as error:
        raise UserError(f'{path}: {error.strerror}') from error
    except ValueError as error:
        raise UserError(f'{path} is damaged, or not a file of train.py: {error}') from error


def open_csv(path, mode='r'):
    """Open a CSV file in UTF-8, skipping a byte order mark, as spreadsheets write.

    Undecodable bytes, as in file names, are kept as they are.
    """
    return open(path, mode, newline='', encoding='utf-8-sig' if mode == 'r' else 'utf-8',
                errors='surrogateescape')


def escape_formula(path):
    """The path, with ./ in front if a spreadsheet would take it for a formula."""
    path = str(path)
    return f'./{path}' if path.startswith(('=', '+', '-', '@', '\t', '\r')) else path
