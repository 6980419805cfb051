"""JSON files of a run, written whole or not at all. No torch."""

import json
import os

from training.console import UserError


def write_json(path, content):
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        temporary.write_text(json.dumps(content, indent=1), encoding='utf-8')
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        error.filename = str(path)  # unset if a write fails
        raise


def read_json(path):
    """Raises UserError if the file is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except OSError as error:
        raise UserError(f'{path}: {error.strerror}') from error
    except ValueError as error:
        raise UserError(f'{path} is damaged, or not a file of train.py: {error}') from error
