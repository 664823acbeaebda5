# The commands of the README and of CI. `make demo` and `make test` set up all they need.

CARGO ?= cargo
SHARED_DATA ?= $(abspath ../shared/data)

.PHONY: demo test test-long test-browser screenshots setup setup-browser build lint doc deny asyncapi model reference fuzz clean

## The main job in one process: embedded broker, simulated scanner, real model (ARGS="--count 20 --rate 5")
demo: setup
	$(CARGO) run -- demo $(ARGS)

## All tests
test: setup
	$(CARGO) test

## The long runs: 300 real images, ten kills of the daemon and of the broker (needs ../shared/data)
test-long: setup
	$(CARGO) test --release --test it -- --ignored --nocapture --test-threads=1

## The dashboard in a real browser
test-browser: setup-browser
	$(CARGO) build
	cd tests/browser && npm test

## docs/images/, as the README shows them (phantoms only)
screenshots: setup-browser
	$(CARGO) build
	cd tests/browser && npm run screenshots

setup-browser:
	@scripts/setup.sh --browser
	@cd tests/browser && npm ci --no-fund --no-audit --loglevel=error

## Packages and libraries that building and testing need; quick when they are there
setup:
	@scripts/setup.sh

build: setup
	$(CARGO) build --release

lint: setup
	$(CARGO) fmt --check
	$(CARGO) clippy --all-targets -- -D warnings

doc: setup
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --no-deps --document-private-items

deny:
	@command -v cargo-deny >/dev/null || $(CARGO) install --locked cargo-deny
	$(CARGO) deny check bans licenses sources

## docs/mqtt/asyncapi.yaml and its schemas, with the AsyncAPI project's own parser (needs node and npm)
asyncapi:
	@if ! command -v npm >/dev/null; then echo "asyncapi: not checked, npm is not installed"; else \
		[ -d .deps/asyncapi/node_modules ] || npm install --prefix .deps/asyncapi --no-audit --no-fund --ignore-scripts @asyncapi/parser@3.6.3 && \
		node scripts/check-asyncapi.mjs; fi

## Train, convert, evaluate and bundle the model (about an hour on two cores; needs the image collections)
model:
	models/training/train.sh $(SHARED_DATA)/mri/index.csv

## Agreement of `classify` with OpenCV + LiteRT in Python on real images (needs ../shared/data)
reference: build
	python3 scripts/compare-reference.py $(SHARED_DATA)

## Fuzz decode, dicom and crop, 10 minutes each
fuzz: setup
	fuzz/run.sh 600

clean:
	$(CARGO) clean
