.PHONY: benchmarks check format test

check:            ## what CI runs, in the environment at hand
	ruff check .
	ruff format --check .
	mypy
	pytest

format:
	ruff format .
	ruff check --fix .

test:             ## the fast tests alone
	pytest -m 'not slow'

benchmarks:       ## beside peers; needs the extra `benchmarks`
	python -m benchmarks.em
