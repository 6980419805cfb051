"""An HTML page about a run: its figures, metrics and flags. No torch.

    report_page.write_page(directory / 'report.html', directory, {'roc': figure})
"""

import base64
import html
import os

from training import predictions
from training.files import read_json

PAGE = '''<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 70em; margin: 2em auto;
       padding: 0 1em }}
h1 {{ font-size: 1.5em }}
h2 {{ font-size: 1.15em; margin-top: 2em }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.92em }}
th, td {{ padding: 0.2em 0.9em 0.2em 0; border-bottom: 1px solid #e6e6e6; text-align: right }}
th {{ font-weight: 600 }}
td {{ white-space: nowrap }}
th:first-child, td:first-child, .text td {{ text-align: left }}
.text td {{ white-space: normal }}
img {{ max-width: 100%; vertical-align: top; margin: 0.5em 0 }}
img.half {{ max-width: 49% }}
.scroll {{ overflow-x: auto }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
'''
SECTIONS = {'Training': ('loss-error',), 'Classes': ('recall', 'confusion'),
            'Thresholds': ('roc', 'precision-recall'), 'Probabilities': ('reliability',),
            'Mistakes': ('mistakes',)}
TOTALS = {'error': 'error %', 'error5': 'top-5 error %', 'balanced_error': 'balanced error %',
          'mean_auc': 'ROC AUC, mean over the classes',
          'mean_average_precision': 'average precision, mean', 'mean_f1': 'F1, mean',
          'mean_sensitivity': 'sensitivity, mean', 'mean_specificity': 'specificity, mean',
          'nll': 'negative log-likelihood',
          'nll_with_temperature': 'the same, logits divided by the temperature',
          'expected_calibration_error': 'expected calibration error',
          'expected_calibration_error_with_temperature':
              'the same, logits divided by the temperature'}
CLASS_COLUMNS = {'auc': 'ROC AUC', 'average_precision': 'average precision', 'f1': 'F1',
                 'sensitivity': 'sensitivity', 'specificity': 'specificity', 'recall': 'recall',
                 'precision': 'precision', 'threshold': 'threshold'}
RULES = {'youden': 'F1, sensitivity and specificity of a class are at the threshold of its '
                   'probability with the highest sensitivity + specificity on val (Youden\'s J).',
         'argmax': 'F1, sensitivity and specificity are those of the most probable class.',
         '0.5': 'F1, sensitivity and specificity are at a probability of 0.5.'}


def write_page(path, directory, drawn):
    """Write one self-contained HTML page about a run that has an evaluation.

    Args:
        path: the file to write; the PNG files of the figures are next to it.
        directory: the run's.
        drawn: {name: Figure}, from plot.py and `figures`.
    """
    record = predictions.read_metrics(directory)
    parts = [totals_table(record)]
    for section, names in SECTIONS.items():
        images = [image(path.with_name(f'{name}.png'), drawn[name]) for name in names
                  if name in drawn]
        if images:
            parts += [f'<h2>{section}</h2>', *images]
        if section == 'Classes':
            parts.append(class_table(record))
    if (directory / 'args.json').exists():
        parts += ['<h2>Flags of the training</h2>',
                  flags_table(read_json(directory / 'args.json'))]
    name = os.path.basename(os.path.abspath(directory))
    page = PAGE.format(title=escape(name), body='\n'.join(parts))
    path.write_text(page, encoding='utf-8')


def escape(text):
    """Escape for HTML; undecodable bytes become question marks, as in figures."""
    return html.escape(str(text).encode(errors='surrogateescape').decode(errors='replace'))


def image(path, figure):
    data = base64.b64encode(path.read_bytes()).decode()
    kind = ' class="half"' if figure.get_figwidth() < 7 else ''  # two side by side
    return f'<img{kind} alt="{escape(path.stem)}" src="data:image/png;base64,{data}">'


def html_table(header, rows, kind=''):
    """An HTML table; escapes the cells."""
    lines = [''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in row)
             for tag, row in [('th', header), *(('td', row) for row in rows)]]
    lines = '\n'.join(f'<tr>{line}</tr>' for line in lines)
    return f'<div class="scroll"><table class="{kind}">\n{lines}\n</table></div>'


def cell(values, key):
    """A metric with its interval, if it has one."""
    value, ends = values.get(key), values.get(f'{key}_interval')
    if value is None:
        return '-'
    digits = 2 if key in ('error', 'error5', 'balanced_error') else 3
    text = f'{value:.{digits}f}'
    return text + (f' ({ends[0]:.{digits}f} to {ends[1]:.{digits}f})' if ends else '')


def totals_table(record):
    splits = record['splits']
    rows = [['images', *(f'{summary["images"]:,}' for summary in splits.values())]]
    rows += [[word, *(cell(summary, key) for summary in splits.values())]
             for key, word in TOTALS.items()
             if any(summary.get(key) is not None for summary in splits.values())]
    intervals, test = record['intervals'], splits['test']
    unit = 'images' if test['units'] == test['images'] else 'groups'
    notes = []
    if 'data' in record:  # not in older files, nor is 'model'
        notes = [f'{record.get("model", "Model")}, tested on {record["data"]}.']
    notes += [f'In brackets: {intervals["level"]:.0%} intervals from {intervals["resamples"]:,} '
              f'bootstrap resamples of the {unit}.', RULES[record['threshold_rule']]]
    if record['temperature'] is not None:
        notes.append(f'Temperature, fitted on val: {record["temperature"]:.4g}. val also chose the '
                     f'model, so its metrics are too good.')
    return html_table(['', *splits], rows) + f'\n<p>{escape(" ".join(notes))}</p>'


def class_table(record):
    rows = record['splits']['test']['classes']
    columns = {key: word for key, word in CLASS_COLUMNS.items()
               if any(row.get(key) is not None for row in rows)}
    header = ['class', 'positive', 'negative', *columns.values()]
    return html_table(header, [[row['class'], row['positives'], row['negatives'],
                                *(cell(row, key) for key in columns)] for row in rows])


def flags_table(record):
    """The flags, settings and versions in the content of args.json."""
    rows = dict(record.get('args', {}))
    rows |= {key: value for key, value in record.items() if key not in ('args', 'versions')}
    rows |= record.get('versions', {})
    return html_table(['', ''], [[key, '' if value is None else value]
                                 for key, value in rows.items()], 'text')
