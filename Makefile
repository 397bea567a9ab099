.PHONY: check format test

check:            ## what CI runs, in the environment at hand
	ruff check .
	ruff format --check .
	mypy
	pytest -n auto

format:
	ruff format .
	ruff check --fix .

test:             ## the fast tests alone
	pytest -n auto -m 'not slow'
