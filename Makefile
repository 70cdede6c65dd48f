.PHONY: train test test-slow lint format image image-test bench bench-applied bench-folder bench-lean bench-logging bench-recipes bench-scaling gpu-check gpu-best soak

train: ## the tutorial's recipe
	accelerate launch train.py

test: ## about four minutes on two cores
	pytest

test-slow: ## tests that take minutes; needs pip install -e '.[trackers]'
	pytest -m 'slow and not gpu' --numprocesses=0

lint: ## the same commands as in .ci/run
	ruff check .
	ruff format --check .
	mypy
	hadolint docker/Dockerfile
	shellcheck tests/container/engine deploy/train.sbatch .ci/run
	kubernetes-validate --strict --quiet deploy/job.yaml

format:
	ruff check --fix .
	ruff format .

image: ## builds the image (docs/docker.md)
	docker build -f docker/Dockerfile -t mnist-trainer --build-arg REVISION=$$(git rev-parse HEAD) \
		--build-arg VERSION=$$(sed -n 's/^__version__ = "\(.*\)"/\1/p' mnist/__init__.py) .

image-test: ## builds the image and checks what docs/docker.md promises, with a private engine if there is none
	python tests/container/try_image.py

bench: ## one epoch compared with the installed alternatives (pip install -e '.[bench]')
	python benchmarks/peers.py

bench-applied: ## mnist predict compared with importing torch, and a prediction on the drawing page
	python benchmarks/applied.py

bench-folder: ## a folder of images: decoding it, an epoch from the cache, memory
	python benchmarks/folder.py

bench-lean: ## what each shortcut around Accelerate's wrappers saves
	python benchmarks/lean.py

bench-logging: ## what metrics, trackers, plots and the report cost
	python benchmarks/logging_cost.py

bench-recipes: ## the recipe fast compared with the published one, five seeds each
	python benchmarks/recipes.py

bench-scaling: ## 1, 2 and 4 processes on this machine, compared with as many independent runs
	python benchmarks/scaling.py

gpu-check: ## on one GPU, ten minutes: tests, mnist verify and the goals; writes gpu-check.md and gpu-check.json
	python benchmarks/gpu.py

gpu-best: ## on one GPU: the recipe best, ten minutes of training, and timm; writes gpu-best.md and gpu-best.json
	python benchmarks/gpu.py --best --minutes 20

soak: ## ten minutes of kills and resumes, compared with an uninterrupted run
	python benchmarks/soak.py --minutes 10
