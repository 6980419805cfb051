# make demo      train a small DenseNet on drawn shapes and show its figures
# make test      run the test suite
# make torture   kill, stop and damage small runs at random: 2 to 10 minutes
# make figures   draw the figures of README and attic/ again; measuring takes three minutes
# All install what they need into .venv, once; PYTHON=python3.12 chooses another Python.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test torture figures

demo: .venv/.installed
	$(BIN)/python train.py --dataset shapes --depth 16 --growth-rate 8 --epochs 6 --print-freq 10 --name demo --overwrite

test: .venv/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

torture: .venv/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python attic/torture.py

figures: .venv/.installed-dev
	$(BIN)/python images/dense_block.py
	$(BIN)/python images/error_vs_parameters.py work/densenet-bc-100-12 work/densenet-bc-40-12
	$(BIN)/python plot.py work/densenet-bc-100-12
	$(BIN)/python attic/feature_reuse.py work/densenet-bc-100-12/best.pth
	$(BIN)/python plot.py work/optimizers/sgd work/optimizers/adam work/optimizers/rmsprop
	$(BIN)/python images/memory_vs_depth.py
	$(BIN)/python bench.py --depth 40 --rounds 8 --device cpu --csv images/speed.csv --plot images/speed.png
	@if command -v dot > /dev/null; \
	then $(BIN)/python make_graph.py --depth 22 --output images/densenet-bc-22-12.svg; \
	else echo 'skipped: images/densenet-bc-22-12.svg needs the program dot (apt install graphviz)'; fi
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; \
	then $(BIN)/python bench.py --arch densenet121 --batch-size 256 --plot images/speed-gpu.png; \
	else echo 'skipped: images/speed-gpu.png needs a GPU'; fi

.venv/.installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -r requirements.txt
	touch $@

.venv/.installed-dev: .venv/.installed requirements-dev.txt
	$(BIN)/pip install -r requirements-dev.txt
	touch $@
