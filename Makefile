.PHONY: train test test-slow lint format bench

train: ## the tutorial's recipe
	accelerate launch train.py

test: ## under six minutes on two cores
	pytest

test-slow: ## what takes minutes
	pytest -m slow

lint: ## the same commands as in .ci/run
	ruff check .
	ruff format --check .
	mypy

format:
	ruff check --fix .
	ruff format .

bench: ## one epoch beside plain PyTorch and the tutorial's own way, interleaved
	python benchmarks/epoch.py
