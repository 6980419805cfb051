"""Runs a script with the pretended GPU: python tests/pretended_cuda script.py ..."""

import os
import sys
import tempfile
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import pretended_cuda  # noqa: E402

reason = pretended_cuda.unavailable_reason()
if reason or not sys.argv[1:]:
    sys.exit(reason or __doc__)
with tempfile.TemporaryDirectory() as folder:
    library = pretended_cuda.build(folder)
    sys.exit(os.spawnve(os.P_WAIT, sys.executable, [sys.executable, *sys.argv[1:]],
                        pretended_cuda.environment(library)))
