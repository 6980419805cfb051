"""How CSV files are opened, and file names written into them. No torch."""


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
