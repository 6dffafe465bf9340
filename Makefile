# make            builds the release binary
# make demo       checkpoints a running process through the streamer, and restores it (as root)
# make test       installs what the tests need, and runs all of them (as root)
# make check      formatting and lints
# make fuzz       FUZZ_SECONDS (60) of each fuzz target, with a nightly Rust
# make bench      the benchmark, as a table
# make install    into $(DESTDIR)$(PREFIX)

PREFIX ?= /usr/local
CARGO ?= cargo
FUZZ_SECONDS ?= 60
FUZZ_TARGETS = marker_stream criu_messages files_img
BINARY = target/release/criu-image-streamer

.PHONY: all build demo test check fuzz bench install uninstall clean

all: build

build:
	$(CARGO) build --release --locked

demo:
	tests/criu/demo

test:
	tests/criu/install-packages
	tests/criu/find-criu
	$(CARGO) test --locked

check:
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings

fuzz:
	$(CARGO) fuzz --version || $(CARGO) install --locked cargo-fuzz
	set -e; for target in $(FUZZ_TARGETS); do \
		mkdir -p fuzz/corpus/$$target; \
		$(CARGO) +nightly fuzz run $$target fuzz/corpus/$$target fuzz/seeds/$$target -- -max_total_time=$(FUZZ_SECONDS) -max_len=65536 -rss_limit_mb=4096; \
	done

bench:
	$(CARGO) bench --locked --bench bench

install: build
	install -D -m 755 $(BINARY) $(DESTDIR)$(PREFIX)/bin/criu-image-streamer

uninstall:
	rm -f $(DESTDIR)$(PREFIX)/bin/criu-image-streamer

clean:
	$(CARGO) clean
