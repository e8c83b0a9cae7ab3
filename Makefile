.PHONY: install fix check test docs release

GALLERY =

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

release:  ## wheel and sdist in dist, the wheel tried in a new environment; TORCH=... pins torch there
	rm -rf dist build/release
	python -m build
	twine check --strict dist/*
	python -m venv build/release
	build/release/bin/python -m pip install --quiet $(or $(TORCH),torch)
	build/release/bin/python -m pip install --quiet dist/*.whl
	cd build/release && bin/python -c "from sklearn_relish import RelishRegressor; RelishRegressor()"
	cd build/release && bin/python -m sklearn_relish --version
