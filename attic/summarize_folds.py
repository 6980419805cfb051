"""Mean and standard deviation over runs, such as the folds of a cross-validation.

    python attic/summarize_folds.py work/xrays-1 work/xrays-2 work/xrays-3

Reads two things of each run: the last epoch's results on the held out images (test.csv) and, if
there is a metrics.json (from `train.py --evaluate` or the end of the run), the results of best.pth
on the test images. Standard deviations are sample standard deviations (n - 1).
"""

import argparse
import csv
import math
import statistics
import sys
from pathlib import Path

if __name__ == '__main__':  # run as a script, attic/ is the import path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training import console
from training.console import UserError, explain_errors
from training.files import read_json

# Flags that may differ between runs of one model and recipe.
OTHER_FLAGS = ('save', 'name', 'resume', 'overwrite', 'fold', 'seed', 'data', 'labels', 'dataset',
               'val_split', 'device', 'workers', 'print_freq', 'tensorboard', 'plot')
METRICS = ('error', 'balanced_error', 'mean_auc', 'mean_average_precision', 'mean_sensitivity',
           'mean_specificity')


def last_epoch(run):
    """{column: value} of the last row of test.csv; raises UserError if the run is not done."""
    flags = read_json(run / 'args.json')['args']
    try:
        with open(run / 'test.csv', newline='') as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f'{run}/test.csv: {error.strerror}') from error
    if not rows:
        raise UserError(f'{run}/test.csv has no epoch yet')
    with explain_errors(f'{run}/test.csv is not as train.py has written it'):
        last = {name: float(value) for name, value in rows[-1].items()}
        epoch = int(last.pop('epoch'))
    if epoch < flags.get('epochs', 0) and not flags.get('patience'):
        raise UserError(f'{run} has done {epoch} of {flags["epochs"]} epochs: --resume goes on')
    return last


def check_folds(runs):
    """Raises UserError if the runs are not different folds of one division of the same images."""
    flags = [read_json(run / 'args.json')['args'] for run in runs]
    folds = [str(found.get('fold')) for found in flags]
    for name in ('dataset', 'data', 'labels', 'val_split', 'seed'):
        values = {Path(str(found.get(name))).name for found in flags}  # they may have been moved
        if len(values) > 1 and (name != 'seed' or {*folds} != {'None'}):
            raise UserError(f'these are runs on other images: --{name} is '
                            f'{", ".join(sorted(values))}')
    if {*folds} != {'None'} and (len({*folds}) < len(folds) or
                                 len({fold.partition('/')[2] for fold in folds}) > 1):
        raise UserError(f'these are not the folds of one division: --fold {", ".join(folds)}')
    for name in sorted(set.intersection(*map(set, flags)) - {*OTHER_FLAGS}):
        values = dict.fromkeys(str(found[name]) for found in flags)
        if len(values) > 1:
            raise UserError(f'these runs differ in --{name.replace("_", "-")}: '
                            f'{", ".join(values)}')


def test_metrics(run):
    """Those of METRICS that metrics.json has; {} without the file."""
    path = run / 'metrics.json'
    if not path.exists():
        return {}
    found = read_json(path)['splits']['test']
    return {name: found[name] for name in METRICS if found.get(name) is not None}


def summarize(runs):
    """Lines: a metric, mean, standard deviation and the values of the runs."""
    check_folds(runs)
    for title, read in (('last epoch, held out images', last_epoch),
                        ('best.pth, test images', test_metrics)):
        values = [read(run) for run in runs]
        common = [name for name in values[0] if all(name in found for found in values)]
        if common:
            yield f'{title}:'
        for name in common:
            column = [found[name] for found in values]
            shown = ', '.join(f'{value:.4g}' for value in column)
            if not any(map(math.isnan, column)):
                yield (f'  {name:<24} {statistics.mean(column):.4g} +- '
                       f'{statistics.stdev(column):.2g}   ({shown})')
            elif not all(map(math.isnan, column)):  # all: the top-5 error of several labels
                yield f'  {name:<24} undefined in some runs   ({shown})'


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
