.PHONY: check fix
check:
	ruff format --check .
	ruff check .
	lint-imports
	basedpyright
	pytest
fix:
	ruff format .
	ruff check --fix .
