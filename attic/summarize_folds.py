"""Mean and standard deviation over runs, such as the folds of a cross-validation.

    python attic/summarize_folds.py work/xrays-1 work/xrays-2 work/xrays-3

Of each run: the results of its last epoch on the images that were held out (test.csv) and, where
`train.py --evaluate` or the end of the run has left a metrics.json, those of best.pth on the test
images. The standard deviation is the sample's, with n - 1.
"""

import argparse
import csv
import json
import statistics
import sys
from pathlib import Path

if __name__ == '__main__':  # run as a script, attic/ is the import path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training import console
from training.console import UserError

METRICS = ('error', 'balanced_error', 'mean_auc', 'mean_average_precision', 'mean_sensitivity',
           'mean_specificity')


def last_epoch(run):
    """{column: value} of the last row of test.csv."""
    try:
        with open(run / 'test.csv', newline='') as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f'{run}/test.csv: {error.strerror}') from error
    if not rows:
        raise UserError(f'{run}/test.csv has no epoch yet')
    return {name: float(value) for name, value in rows[-1].items() if name != 'epoch'}


def test_metrics(run):
    """Those of METRICS that metrics.json has; {} without the file."""
    path = run / 'metrics.json'
    if not path.exists():
        return {}
    found = json.loads(path.read_text())['splits']['test']
    return {name: found[name] for name in METRICS if found.get(name) is not None}


def summarize(runs):
    """Lines: a metric, mean, standard deviation and the values of the runs."""
    for title, read in (('last epoch, held out images', last_epoch),
                        ('best.pth, test images', test_metrics)):
        values = [read(run) for run in runs]
        common = [name for name in values[0] if all(name in found for found in values)]
        if common:
            yield f'{title}:'
        for name in common:
            column = [found[name] for found in values]
            if all(value == value for value in column):  # NaN: top-5 error of several labels
                yield (f'  {name:<24} {statistics.mean(column):.4g} +- '
                       f'{statistics.stdev(column):.2g}   '
                       f'({", ".join(f"{value:.4g}" for value in column)})')


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN', help='run directory')
    args = parser.parse_args(argv)
    try:
        if len({run.resolve() for run in args.runs}) < max(2, len(args.runs)):
            raise UserError('it needs two runs or more, each named once')
        print(*summarize(args.runs), sep='\n')
    except UserError as error:
        console.warn(error, 'error', 'summarize_folds.py')
        sys.exit(2)


if __name__ == '__main__':
    main()
