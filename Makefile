.PHONY: check format test

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
