"""One-line messages for errors that are not bugs."""

from training import distributed
from training.console import UserError
from training.device import ran_out_of_memory


def explanation(error, memory_advice):
    """One-line message for an error that the user can do something about; None for bugs.

    Args:
        memory_advice: what needs less memory, such as 'give a lower --batch-size'.
    """
    text = ' '.join(str(error).split())
    if isinstance(error, UserError):
        return text
    if ran_out_of_memory(error):
        return f'out of memory: {memory_advice}'
    # torch reports a dead worker, or its connection is reset or closed.
    if 'DataLoader worker' in text or isinstance(error, (ConnectionError, EOFError)):
        return f'a worker process has died ({text}): if it ran out of memory, {memory_advice}'
    if isinstance(error, OSError):  # such as a full disk
        where = f'{error.filename}: ' if error.filename else ''
        return where + (error.strerror or text)
    if distributed.lost_a_peer(error):
        return 'the connection to another process was lost; its error may be above'
    return None
