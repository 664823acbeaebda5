# The commands of the README and of CI. `make demo` and `make test` set up all they need.

CARGO ?= cargo
SHARED_DATA ?= $(abspath ../shared/data)

.PHONY: demo test faults soak fleet baseline growth flamegraph baseline-python instructions test-tflite test-emulated test-deb test-arm64 test-board test-browser screenshots cross-aarch64 cross-armv7 cross-x86_64 deb setup setup-browser build lint doc deny asyncapi model model-train model-evaluate model-convert convert test-convert reference fuzz clean

## The main job in one process: embedded broker, simulated scanner, real model (ARGS="--count 20 --rate 5")
demo: setup
	$(CARGO) run -- demo $(ARGS)

## All tests
test: setup
	$(CARGO) test

## The fault suite in its long form: the parts that `make test` runs short or not at all (some need ../shared/data)
faults: setup
	$(CARGO) test --test it -- --ignored --nocapture --test-threads=1 --skip soak::

## An hour at full speed and at an image a minute: memory, descriptors, threads, ledger (SOAK_MINUTES=60)
soak: setup
	$(CARGO) test --release --test it soak:: -- --ignored --nocapture

## A broker, a dashboard and 1000 simulated appliances with a result a second each: losses, lag, memory, processor
## (FLEET_APPLIANCES=1000 FLEET_SECONDS=60 FLEET_BURST=10, FLEET_IN_STEP=1 for all bursts at once,
## FLEET_ROWS=20000 for a history that forgets meanwhile, FLEET_BROKER="max_queued_messages 1000" for more of Mosquitto's configuration)
fleet: build
	SCANSENTRY_PROGRAM=$(CURDIR)/target/release/scansentry $(CARGO) test --test it fleet::a_thousand -- --ignored --nocapture

## Beside a Python pipeline, from outside: latency, burst, CPU, memory (ARGS="--idle 600"; as on a small board: ARGS=--quarter, as root)
baseline: build baseline-python
	target/baseline/bin/python benches/baseline/compare.py $(ARGS)

## 100,000 images in the folder and a backlog of 50,000 messages: docs/images/growth.svg (half an hour)
growth: build baseline-python
	target/baseline/bin/python benches/baseline/growth.py --plot docs/images/growth.svg $(ARGS)

## Where the processor's time goes: docs/images/flame-alone.svg and flame-burst.svg (as root; a build of its own, with symbols)
flamegraph: setup baseline-python
	@scripts/setup.sh --packages linux-perf
	command -v inferno-flamegraph || $(CARGO) install --locked inferno
	RUSTFLAGS="-C force-frame-pointers=yes" CARGO_PROFILE_RELEASE_STRIP=none CARGO_PROFILE_RELEASE_DEBUG=line-tables-only $(CARGO) build --release --target-dir target/flamegraph
	target/baseline/bin/python benches/baseline/flame.py --program target/flamegraph/release/scansentry --out docs/images $(ARGS)

baseline-python:
	python3 -m venv target/baseline
	target/baseline/bin/pip install -q -r benches/baseline/requirements.txt

## Instructions that a picture takes on ARM boards, counted under QEMU
instructions: setup
	@scripts/setup.sh --packages gcc libc6-dev qemu-user
	set -e; for triple in $(EMULATED); do cross/build.sh $$triple; done
	python3 benches/instructions/count.py $(EMULATED)

## The dashboard in a real browser
test-browser: setup-browser
	$(CARGO) build
	cd tests/browser && npm test

## docs/images/, as the README shows them (phantoms only)
screenshots: setup-browser
	$(CARGO) build
	cd tests/browser && npm run screenshots

# Node.js 18 or newer from wherever; Debian 12 has 18.
setup-browser: setup
	@scripts/setup.sh --packages chromium $$(node -e 'process.exit(parseInt(process.versions.node) < 18 ? 1 : 0)' 2>/dev/null && command -v npm >/dev/null || echo nodejs npm)
	@cd tests/browser && npm ci --no-fund --no-audit --loglevel=error

## The same tests with the second engine, TensorFlow Lite 1.15 (compiled from source: some minutes at first)
test-tflite: setup
	@scripts/setup.sh --packages g++ libclang-dev make
	SCANSENTRY__MODEL__ENGINE=tflite $(CARGO) test --features tflite

## What a package has, for each kind of board: target/TRIPLE/stage (see cross/README.md)
cross-aarch64:
	cross/build.sh aarch64-unknown-linux-gnu
cross-armv7:
	cross/build.sh armv7-unknown-linux-gnueabihf
cross-x86_64:
	cross/build.sh x86_64-unknown-linux-gnu

## The cross-built programs do the main job here, under QEMU
EMULATED ?= aarch64-unknown-linux-gnu armv7-unknown-linux-gnueabihf
test-emulated: setup
	@scripts/setup.sh --packages qemu-user-static
	set -e; for triple in $(EMULATED); do cross/build.sh $$triple; done
	SCANSENTRY_EMULATED="$(EMULATED)" $(CARGO) test --test it -- emulated --nocapture

## Packages and libraries that building and testing need; quick when they are there
setup:
	@scripts/setup.sh

build: setup
	$(CARGO) build --release

## Packages for amd64, arm64 and armhf in target/debian (TRIPLES="x86_64-unknown-linux-gnu" for one)
TRIPLES ?= x86_64-unknown-linux-gnu aarch64-unknown-linux-gnu armv7-unknown-linux-gnueabihf
deb:
	set -e; for triple in $(TRIPLES); do cross/build.sh $$triple; scripts/deb.sh $$triple; done

## The amd64 package in a booted Debian 12: install, run, update, roll-out with Ansible, remove, purge (as root; 5 minutes)
test-deb:
	cross/build.sh x86_64-unknown-linux-gnu
	@# The newer one first: cargo-deb takes away what it made before.
	DEB_OUTPUT=target/deb-root/newer/ scripts/deb.sh x86_64-unknown-linux-gnu 99-1
	scripts/deb.sh x86_64-unknown-linux-gnu
	tests/packaging/test-deb.sh target/debian/scansentry_*_amd64.deb target/deb-root/newer/scansentry_*_amd64.deb

## The arm64 package in an emulated arm64 Debian 12: check, classify, run (as root; the first time it makes that system, five minutes)
ARM64_DEB = target/debian/scansentry_*_arm64.deb
test-arm64:
	$(MAKE) deb TRIPLES=aarch64-unknown-linux-gnu
	tests/packaging/board.py chroot $(ARM64_DEB)

## The same package on an emulated board with systemd, which is reset in the middle of a batch (as root; ten minutes)
test-board:
	$(MAKE) deb TRIPLES=aarch64-unknown-linux-gnu
	tests/packaging/board.py boot $(ARM64_DEB)

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

## Render, train, evaluate, convert and bundle the model (three hours on two cores; SEEDS=1 for one; needs the image collections)
model:
	INDEX=$(SHARED_DATA)/mri/index.csv models/training/train.sh
model-train:
	INDEX=$(SHARED_DATA)/mri/index.csv models/training/train.sh render train
model-evaluate:
	INDEX=$(SHARED_DATA)/mri/index.csv models/training/train.sh evaluate
model-convert:
	INDEX=$(SHARED_DATA)/mri/index.csv models/training/train.sh convert bundle

## A bundle out of somebody's model: MODEL=file IMAGES=folder OUT=models/mine (ARGS for more; models/convert/README.md)
convert:
	@[ -n "$(MODEL)" ] && [ -n "$(OUT)" ] || { echo "convert: MODEL=file and OUT=folder are needed; and IMAGES=folder, unless it is a .tflite file" >&2; exit 2; }
	@scripts/setup.sh --packages python3 python3-venv
	@models/convert/convert.sh --model "$(MODEL)" $(if $(IMAGES),--images "$(IMAGES)") --out "$(OUT)" $(ARGS)

## Models of every kind through the converter and the program
test-convert: setup
	$(CARGO) build
	PROGRAM=models/convert/tests/test_convert.py models/convert/convert.sh

## Agreement of `classify` with OpenCV + LiteRT in Python on real images (needs ../shared/data)
reference: build
	python3 scripts/compare-reference.py $(SHARED_DATA)

## Fuzz decode, dicom and crop, 10 minutes each
fuzz: setup
	fuzz/run.sh 600

clean:
	$(CARGO) clean
