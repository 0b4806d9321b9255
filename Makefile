# `make check` is what CI runs, in the environment that is active: pip install -e '.[dev]'
.PHONY: check format lint types imports test test-fast

check:
	.ci/check

format:
	ruff format .
	ruff check --fix .

lint:
	ruff format --check .
	ruff check .

types:
	mypy

imports:
	lint-imports

test:
	pytest

test-fast:
	pytest -m "not slow"
