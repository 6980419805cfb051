# make demo   train a small DenseNet on drawn shapes and show its figures
# make test   run the test suite
# Both install what they need into .venv, once; PYTHON=python3.12 chooses another Python.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test

demo: .venv/.installed
	$(BIN)/python train.py --dataset shapes --depth 16 --growth-rate 8 --epochs 6 --print-freq 10 --name demo --overwrite

test: .venv/.installed-dev
	$(BIN)/python -m pytest

.venv/.installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -r requirements.txt
	touch $@

.venv/.installed-dev: .venv/.installed requirements-dev.txt
	$(BIN)/pip install -r requirements-dev.txt
	touch $@
