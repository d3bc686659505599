# Two commands for a newcomer: `make demo` and `make test`. Both set everything up with nothing but python3.11 and make.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE = 1

.PHONY: demo test check setup golden wheel-test zoo faults restarts processes inductor mutants figures kill-test weights-memory

demo: setup
	$(BIN)/pipecompile examples/gpt2.py --stages 4 --out build
	$(BIN)/pipecompile verify build
	$(BIN)/pipecompile run build --steps 20

test: setup
	$(MAKE) check

check:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

zoo: setup
	$(BIN)/python -m tests.zoo.harness

# kill -9 at random points during a save, 50 times: no checkpoint may be lost.
kill-test: setup
	$(BIN)/python -m benchmarks.kill_saves

# The peak memory of a rank that makes or reads its weights, against its own share.
weights-memory: setup
	$(BIN)/python -m benchmarks.weights

# A process raises, is killed, is stopped or hangs at 20 random places each: all must be told of that place.
faults: setup
	$(BIN)/python -m tests.runtime.faults

# A rank is killed at random moments of a run, once or twice, and torchrun starts all anew: the same losses, to the last bit.
restarts: setup
	$(BIN)/python -m tests.runtime.restarts

# Every schedule on GPT-2, T5 and UNet2D in two real processes; two replicas of two ranks.
processes: setup
	PIPECOMPILE_ALL_PROCESSES=1 $(BIN)/python -m pytest tests/test_schedules_processes.py tests/test_replicas.py

# Stages under torch.compile with its default backend, which compiles C++: other sizes, dropout, two real processes.
inductor: setup
	PIPECOMPILE_INDUCTOR=1 $(BIN)/python -m pytest tests/test_compiled_stages.py

# Random changes of programs of every schedule: what a reference interpreter finds wrong, verify refuses by name. Random
# changes of the files that others may write: each is refused with an error of ours, or is safe to run.
mutants: setup
	$(BIN)/python -m tests.test_mutants 100000
	$(BIN)/python -m tests.test_hostile 50000

# The wheel alone, in an environment of its own: what `pip install pipecompile` gives.
wheel-test: setup
	rm -rf dist
	$(BIN)/python -m build --wheel --outdir dist
	$(PYTHON) -m venv dist/venv
	dist/venv/bin/python -m pip install --quiet -c constraints.txt 'torch==2.13.0'
	dist/venv/bin/python -m pip install --quiet -c constraints.txt "$$(echo dist/*.whl)[examples]"
	cp examples/gpt2.py dist
	cd dist && venv/bin/pipecompile --help >/dev/null
	cd dist && venv/bin/pipecompile gpt2.py --stages 4 && venv/bin/pipecompile verify build && venv/bin/pipecompile run build --steps 5

# Figures of benchmarks/README.md; matplotlib is installed for these alone.
figures: setup
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[figures]'
	$(BIN)/python benchmarks/plot_memory.py

golden: setup
	$(BIN)/python -m pytest --update-golden

setup: $(VENV)/installed

# What is installed is compiled on all cores afterwards; a few packages hold templates that are no Python.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --no-compile --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install -qq --no-compile -c constraints.txt 'torch==2.13.0'
	$(BIN)/python -m pip install -qq --no-compile -c constraints.txt -e '.[examples,test]'
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	touch $@
