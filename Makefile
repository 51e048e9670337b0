# Each target builds what it needs in .venv, under the versions of constraints.txt (peers: in
# .venv-peers, under those of requirements-peers.txt); once that stands, nothing here touches the
# network. ARGS goes through: make test ARGS='-k solve_tile'

PYTHON ?= python3
VENV := .venv
PEERS := .venv-peers
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install --constraint constraints.txt

.PHONY: test demo lint bench peers clean
.NOTPARALLEL:

test: $(VENV)/.dev
	$(RUN) -m pytest $(ARGS)

demo: $(VENV)/.demo
	$(RUN) -m benchmarks.demo $(ARGS)

lint: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# A smoke run: every suite, few rounds. For timings worth quoting: $(RUN) -m pytest benchmarks --benchmark-enable
bench: $(VENV)/.dev
	$(RUN) -m pytest benchmarks --benchmark-enable --benchmark-min-rounds=1 --benchmark-max-time=0.1 $(ARGS)

# Other packages' pipelines with our solver in them: an environment of several gigabytes, minutes.
peers: $(PEERS)/.installed
	$(PEERS)/bin/python -m pytest tests/peers -m '' $(ARGS)

clean:
	rm -rf $(VENV) $(PEERS) build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# Stamps: a file says that its step came to its end.

$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || \
	  { echo "error: $(PYTHON) not found; name a Python >= 3.10: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: $(PYTHON) is older than 3.10; name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: $(PYTHON) has no venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# torch alone and by its exact version first: no later step can then swap it for another build
$(VENV)/.torch: $(VENV)/.created constraints.txt
	$(PIP) $$(grep '^torch==' constraints.txt)
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.demo  # dev has all that the demo needs

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[demo]'
	@touch $@

# torch first, as above
$(PEERS)/.installed: requirements-peers.txt
	$(PYTHON) -m venv --clear $(PEERS)
	$(PEERS)/bin/python -m pip --disable-pip-version-check install $$(grep '^torch==' $<)
	$(PEERS)/bin/python -m pip --disable-pip-version-check install --requirement $<
	$(PEERS)/bin/python -m pip --disable-pip-version-check install --no-deps --editable .
	@touch $@
