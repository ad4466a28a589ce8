# AFTer-SAM. `make help` lists what there is.
#
# Everything runs in .venv, made and filled on first use. To use an environment that exists, such as a
# cluster's own torch, name its interpreter: `make test PYTHON=python3`; nothing is installed then.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-triton36 nnunet bench bench-compare first-contact figure reference check format clean

DEMO ?= demo-run
TESTS ?=
BENCH ?= quick
OUT ?= first-contact
KERNEL_TESTS = $(addprefix tests/test_,$(addsuffix .py,axial_attention row_norm lora_linear lora_qkv rel_pos_attention rel_terms slice_attention compile))

ifdef PYTHON
PY := $(PYTHON)
READY :=
export PYTHONPATH := $(CURDIR):$(CURDIR)/kernels$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PY := .venv/bin/python
READY := .venv/installed
endif

help: ## list these targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'
	@echo "  PYTHON=python3 uses that environment instead of .venv and installs nothing"

setup: $(READY) ## make .venv with everything the other targets need

demo: $(READY) ## synthetic scans: train, segment, score, report in demo-run/ (minutes); then a real CT (seconds)
	$(PY) -m aftersam.demo -o $(DEMO)
	$(PY) -m aftersam.demo -o $(DEMO) --real

test: $(READY) ## run the tests; TESTS="tests/test_config.py -x" passes on to pytest
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --dist loadfile $(TESTS)

# The interpreter of 3.6 takes loop bounds as arrays of one element, of which NumPy warns; warnings are errors here.
test-triton36: .venv-triton36/installed ## the kernels under Triton 3.6, which GPU images in the field have
	PYTHONPATH=kernels .venv-triton36/bin/python -m pytest -q -p no:cacheprovider -m "not drawn" \
		-W "ignore:Conversion of an array:DeprecationWarning" $(KERNEL_TESTS)

nnunet: .venv-nnunet/installed ## make .venv-nnunet, in which the accuracy table's nnU-Net rows are trained

bench: $(READY) ## time every op against its rivals, into benchmarks/results/; BENCH=quick, full or a subject
	$$(chrt -f 1 true 2>/dev/null && echo chrt -f 1) $(PY) -m benchmarks $(BENCH) # other work then waits, where we may ask for it

bench-compare: $(READY) ## ratio of two results, A=old.json B=new.json, and whether it exceeds the spread
	$(PY) -m benchmarks.compare $(A) $(B)

first-contact: $(READY) ## new hardware: tests, times, tiles and targets in seven minutes, each line kept in OUT
	$(PY) -m benchmarks.first_contact --out $(OUT)

figure: $(READY) ## rewrite the measured pages of docs/explanation and README's table from the newest results
	$(PY) -m benchmarks.figure

reference: $(READY) ## rewrite docs/reference/flags.md and errors.md from the commands and the tests' table of errors
	$(PY) docs/reference/write.py

check: $(READY) ## ruff, formatting and mypy, as CI runs them
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(READY) ## let ruff fix and format the code
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean: ## remove caches, builds and demo-run; .venv stays
	rm -rf build dist *.egg-info kernels/build kernels/dist kernels/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis $(DEMO)
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +

# torchvision's wheel does not import beside torch's CPU build, and transformers and PEFT import it where they find it.
# So it stays, with timm that needs it, in a folder that only our tests and benchmarks search (benchmarks/__init__.py).
.venv/installed: setup.py constraints.txt $(wildcard kernels/axial_fusion/cpu/*.[ch])
	@echo "making .venv: about 2 GB, some minutes, once"
	python3 -m venv .venv
	.venv/bin/python -m pip install -q -c constraints.txt -e '.[test,dev]' diffusers transformers
	.venv/bin/python -m pip install -q -c constraints.txt --no-deps --target .venv/hosts timm torchvision
	touch $@

# torch's CUDA build asks for one Triton alone, hence --no-deps; Triton 3.6's interpreter needs numpy below 2.4.
.venv-triton36/installed: constraints.txt
	python3 -m venv .venv-triton36
	.venv-triton36/bin/python -m pip install -q -c constraints.txt torch hypothesis pytest pytest-timeout
	.venv-triton36/bin/python -m pip install -q 'numpy<2.4'
	.venv-triton36/bin/python -m pip install -q --no-deps triton==3.6.0
	touch $@

# nnunetv2 requires timm and so torchvision, whose wheel fails to import with torch's CPU build. Its U-Nets need neither:
# what they import is installed first, then nnU-Net's packages without their requirements.
.venv-nnunet/installed: setup.py constraints.txt
	@echo "making .venv-nnunet: about 2.5 GB, some minutes, once"
	python3 -m venv .venv-nnunet
	.venv-nnunet/bin/python -m pip install -q -c constraints.txt -e '.[accuracy]' blosc2 connected-components-3d pandas \
		scikit-image scikit-learn seaborn SimpleITK tifffile
	.venv-nnunet/bin/python -m pip install -q -c constraints.txt --no-deps nnunetv2==2.8.1 'acvl-utils<0.3' batchgenerators \
		batchgeneratorsv2 'dynamic-network-architectures<0.5'
	touch $@
