# make            builds the release binary
# make demo       checkpoints a running process through the streamer, and restores it (as root)
# make test       installs what the tests need, and runs all of them (as root)
# make check      formatting and lints
# make bench      the benchmark, as a table
# make install    into $(DESTDIR)$(PREFIX)

PREFIX ?= /usr/local
CARGO ?= cargo
BINARY = target/release/criu-image-streamer

.PHONY: all build demo test check bench install uninstall clean

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

bench:
	$(CARGO) bench --locked --bench bench

install: build
	install -D -m 755 $(BINARY) $(DESTDIR)$(PREFIX)/bin/criu-image-streamer

uninstall:
	rm -f $(DESTDIR)$(PREFIX)/bin/criu-image-streamer

clean:
	$(CARGO) clean
