"""Labels in a CSV file: one class per image, or multi-label.

    file,label,split,group              file,effusion,nodule,split,group
    a/1.png,cat,train,owner 3           p1/1.png,0,1,train,p1
    a/2.png,dog,test,owner 7            p1/2.png,1,,train,p1

The values of a column `label` are the classes, and other columns are not used. Without it, each
column is a class, with 1 (present), 0 (absent) or nothing (unknown). `split` (train, val, test) and
`group` are optional; images of one group, such as a patient, stay together. The paths are relative
to --data.
"""

import collections
import csv
import dataclasses
import functools
import os
import textwrap
from dataclasses import dataclass

import numpy as np

from training.console import DataError
from training.files import open_csv

VAL_FOLDERS = ('val', 'valid', 'validation')  # accepted names of folders and splits
SPLITS = {'train': 'train', **dict.fromkeys(VAL_FOLDERS, 'val'), 'test': 'test'}
OTHER_COLUMNS = ('file', 'label', 'split', 'group')
FINDINGS = {'0': 0, '0.0': 0, '1': 1, '1.0': 1, '': np.nan}
MAX_ROWS = 10  # in an error message
SAVE_AS_UTF8 = 'save it as "CSV UTF-8"'


@dataclass(frozen=True)
class Table:
    """The N rows of a labels file.

    `labels` has the class name of each row. If it is None, the table is multi-label: `columns` has
    the names of C classes, and `findings` is float32 [N, C] of 0, 1 and NaN (unknown).
    """

    path: str
    rows: list               # line numbers in the file; the header is line 1
    files: list
    labels: list = None
    columns: tuple = ()
    findings: np.ndarray = None
    splits: list = None      # 'train', 'val' or 'test'; None without such a column
    groups: list = None
    unused: tuple = ()       # names of other columns

    def of_split(self, split):
        """A Table with the rows of a split, or all rows if there are no splits."""
        if self.splits is None:
            return self
        kept = [i for i, name in enumerate(self.splits) if name == split]
        parts = {name: [values[i] for i in kept] for name, values in vars(self).items()
                 if isinstance(values, list)}
        findings = None if self.findings is None else self.findings[kept]
        return dataclasses.replace(self, **parts, findings=findings)

    def classes(self):
        """Class names: the columns, or the sorted labels (by value if all are numbers)."""
        if self.labels is None:
            return self.columns
        names = sorted(set(self.labels))
        return tuple(sorted(names, key=int if all(map(str.isdecimal, names)) else None))

    def label_array(self, classes):
        """Labels by index in `classes`: int64 [N] or, multi-label, float32 [N, C].

        Raises:
            DataError: the table has other classes.
        """
        index = {name: i for i, name in enumerate(classes)}
        if self.labels is not None:
            self.check('label', [name in index for name in self.labels], 'is not a training class')
            return np.array([index[name] for name in self.labels], np.int64)
        result = np.full((len(self.files), len(classes)), np.nan, np.float32)
        for name, column in zip(self.columns, self.findings.T):
            if name not in index:
                raise DataError(f'{self.path}: the column {name} is not a training class')
            result[:, index[name]] = column
        return result

    def check(self, name, is_right, what, values=None):
        """Raises DataError if cells of a column are wrong; names the rows."""
        values = getattr(self, f'{name}s') if values is None else values
        wrong = [f'row {row} ({value})' for row, value, right
                 in zip(self.rows, values, is_right) if not right]
        if wrong:
            more = f' and {len(wrong) - MAX_ROWS} more' if len(wrong) > MAX_ROWS else ''
            raise DataError(f'{self.path}, column {name}: {", ".join(wrong[:MAX_ROWS])}{more} '
                            f'{what}')

    def check_classes(self, split, warn):
        """Check a multi-label split; warn if all known training labels of a class are equal.

        Raises:
            DataError: no label of the split is known, or no training label of a class.
        """
        if self.labels is not None:
            return
        known = ~np.isnan(self.findings)
        if not known.any():
            raise DataError(f'{self.path}: no label of the {split} images is known')
        if split != 'train':
            return
        unknown = [name for name, found in zip(self.columns, known.T) if not found.any()]
        if unknown:
            raise DataError(f'{self.path}: no label of {", ".join(unknown[:MAX_ROWS])} is known in '
                            f'the training images: leave out these columns')
        equal = [name for name, found in zip(self.columns, self.findings.T)
                 if np.nanmin(found) == np.nanmax(found)]
        if equal and warn is not None:
            warn(f'{self.path}: all known labels to train on are the same for '
                 f'{", ".join(equal[:MAX_ROWS])}')

    def warn_of_unused_columns(self, warn):
        if self.unused:
            names = textwrap.shorten(', '.join(self.unused), 100)
            warn(f'{self.path}: not used: {names}; a column `split` names train, val or test, and '
                 f'images of one `group`, such as a patient, stay together')

    def warn_of_shared_groups(self, warn):
        """Warn if images of one group are in several splits."""
        if not self.splits or not self.groups:
            return
        splits = collections.defaultdict(set)
        for group, split in zip(self.groups, self.splits):
            splits[group].add(split)
        shared = [group for group, found in splits.items() if len(found) > 1]
        if shared:
            warn(f'{self.path}: {len(shared)} groups are in more than one split, such as '
                 f'{shared[0]} in {" and ".join(sorted(splits[shared[0]]))}: test results on '
                 f'them are too good')


def read_table(path):
    """Read a labels file into a Table.

    Raises:
        DataError: no such file, invalid columns or values, or a duplicate file; names the rows.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f'{path}: {error.strerror}') from error
    return _read_table(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=2)  # of 50,000 rows it takes half a second, and it is needed often
def _read_table(path, *_):
    header, rows = _read_rows(path)
    if 'file' not in header:
        raise DataError(f'{path} has no column `file`: its header is {",".join(header)[:100]!r}; '
                        f'it needs file,label or file and a column per class, separated by commas')
    cells = {name: [row[i].strip() for _, row in rows] for i, name in enumerate(header)}
    files = [name and os.path.normpath(name) for name in cells['file']]
    columns = tuple(name for name in header if name not in OTHER_COLUMNS)
    table = Table(str(path), [number for number, _ in rows], files, cells.get('label'),
                  splits=cells.get('split'), groups=cells.get('group'))
    table.check('file', table.files, 'names no file')
    count = collections.Counter(table.files)
    table.check('file', [count[name] == 1 for name in table.files], 'is named more than once')
    if table.splits:
        table.check('split', [name in SPLITS for name in table.splits],
                    f'is none of {", ".join(SPLITS)}')
        table = dataclasses.replace(table, splits=[SPLITS[name] for name in table.splits])
    if table.groups:
        table.check('group', table.groups, 'is empty: give single images a group of their own')
    if table.labels:
        table.check('label', table.labels, 'is empty: each image needs its class')
        table.check('label', map(is_utf8, table.labels), f'is not in UTF-8: {SAVE_AS_UTF8}')
        return dataclasses.replace(table, unused=columns)
    if not columns:
        raise DataError(f'{path} has no labels: it needs a column `label`, or one per class')
    for name in columns:
        table.check(name, [value in FINDINGS for value in cells[name]], 'is not 1 (present), 0 '
                    '(absent) or empty (unknown); remove columns that are not classes',
                    values=cells[name])
    findings = np.array([[FINDINGS[value] for value in cells[name]] for name in columns])
    return dataclasses.replace(table, columns=columns, findings=findings.T.astype(np.float32))


def is_utf8(text):
    """Whether it was UTF-8 in the file; file names need not be."""
    return not any('\udc80' <= character <= '\udcff' for character in text)


def without_empty_columns(lines, header):
    """Drop columns at the end without name and values, which spreadsheets add."""
    while header and not header[-1] and all(
            len(row) == len(header) and not row[-1].strip() for _, row in lines):
        lines, header = [(number, row[:-1]) for number, row in lines], header[:-1]
    return lines, header


def _read_rows(path):
    """The column names, and (line number, cells) of each row that is not empty."""
    try:
        with open_csv(path) as file:
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, row) for row in reader if any(map(str.strip, row))]
    except OSError as error:
        raise DataError(f'{path}: {error.strerror}') from error
    except csv.Error as error:
        raise DataError(f'{path} is not a CSV file: {error}') from error
    if any('\0' in cell for _, row in lines[:2] for cell in row) or lines and not all(
            map(is_utf8, lines[0][1])):
        raise DataError(f'{path} is not in UTF-8: {SAVE_AS_UTF8}')
    if len(lines) < 2:
        raise DataError(f'{path} has no rows: it needs a header, and a row per image')
    header = [name.strip() for name in lines[0][1]]
    header = [name.lower() if name.lower() in ('file', 'label') else name for name in header]
    for name in header:
        if name not in OTHER_COLUMNS and name.lower() in OTHER_COLUMNS:
            raise DataError(f'{path} has a column {name}: it must be called {name.lower()}')
    lines, header = without_empty_columns(lines, header)
    if '' in header:
        raise DataError(f'{path} has a column without a name, perhaps an index that pandas wrote: '
                        f'to_csv(..., index=False) leaves it out')
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise DataError(f'{path} has two columns {twice[0]!r}')
    uneven = [f'{number} has {len(row)}' for number, row in lines if len(row) != len(header)]
    if uneven:
        raise DataError(f'{path}: the header has {len(header)} cells, and row {uneven[0]}; names '
                        f'with commas need quotes')
    return header, lines[1:]
