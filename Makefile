.PHONY: install fix check test docs

GALLERY = .*

install:  ## the package with its development dependencies, in the active environment
	python -m pip install -e ".[test,lint]"
	pre-commit install

fix:  ## what ruff can correct by itself
	ruff check --fix .
	ruff format .

check:  ## lint, format and types, without changing a file
	ruff check .
	ruff format --check .
	mypy

test:  ## all tests, with branch coverage
	pytest --cov -n auto --dist loadfile

docs:  ## the site in docs/_build/html; `make docs GALLERY=none` does not run the examples
	GALLERY=$(GALLERY) sphinx-build -W --keep-going -q docs docs/_build/html
