# make            builds the release binary, and leaves it here as ./criu-image-streamer
# make demo       checkpoints a running process through the streamer, and restores it (as root)
# make test       installs what the tests need, and runs all of them (as root)
# make check      formatting, lints, and the width of comments
# make fuzz       FUZZ_SECONDS (60) of each fuzz target, with a nightly Rust
# make bench      the benchmark, as tables (as root); BENCH='--only restore/' for a part of it, ORIGINAL= and BASELINE=
#                 for other programs beside it
# make install    into $(DESTDIR)$(PREFIX), with the manual page and the shells' completions
# make deb        a Debian package of the same, in target/
#
# BUILD=debug builds without optimizing, which takes less time.

PREFIX ?= /usr/local
BINDIR ?= $(PREFIX)/bin
# CRIU's CI installs Rust, and runs make in the same shell, whose PATH does not know of it yet.
CARGO ?= $(or $(shell command -v cargo 2>/dev/null),$(wildcard $(HOME)/.cargo/bin/cargo),cargo)
BUILD ?= release
FUZZ_SECONDS ?= 60
FUZZ_TARGETS = marker_stream criu_messages files_img

ifeq ($(BUILD),release)
PROFILE = --release
else ifneq ($(BUILD),debug)
$(error BUILD is release or debug, and not $(BUILD))
endif

OUTPUT = $(or $(CARGO_TARGET_DIR),target)/$(BUILD)
BINARY = $(OUTPUT)/criu-image-streamer
DOCUMENTS = $(OUTPUT)/documents
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)

.PHONY: all criu-image-streamer build documents demo test check fuzz bench install uninstall deb clean

all: criu-image-streamer

# From here CRIU's zdtm.py takes the program, with this directory in its PATH, and FastFreeze. It is moved into place, as
# it may be running.
criu-image-streamer: build
	cp $(BINARY) $@.$$$$ && mv -f $@.$$$$ $@

build:
	$(CARGO) build $(PROFILE) --locked

# The manual page is made from --help. Without help2man there is none.
documents: build
	$(CARGO) run $(PROFILE) --locked --quiet --example documents -- $(DOCUMENTS)
	rm -f $(DOCUMENTS)/criu-image-streamer.1
	if command -v help2man >/dev/null; then \
		help2man --no-info --section=1 --include=docs/criu-image-streamer.h2m \
			--output=$(DOCUMENTS)/criu-image-streamer.1 $(BINARY); \
	else \
		echo 'make: no manual page without help2man (Debian: apt-get install help2man)' >&2; \
	fi

demo:
	examples/demo

# The tests wait for processes more than half of the time, so that twice as many run as there are processors.
test:
	tests/criu/install-packages
	tests/criu/find-criu
	tests/s3/set-up
	$(CARGO) test --locked -- --test-threads=$$(($$(nproc) * 2))

# Static binaries and 32 bit, where the compiler has their libraries: `rustup target add …`.
OTHER_TARGETS = $(filter-out $(shell rustc -vV | sed -n 's/^host: //p'),$(shell rustup target list --installed 2>/dev/null))

check:
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings
	! LC_ALL=C.UTF-8 grep -rnP --include='*.rs' '^(?=\s*//).{101}' src tests examples fuzz/fuzz_targets build.rs || { echo 'make check: wrap these comments at 100 columns' >&2; exit 1; }
	set -e; for target in $(OTHER_TARGETS); do $(CARGO) check --locked --quiet --target $$target; done

fuzz:
	$(CARGO) fuzz --version || $(CARGO) install --locked cargo-fuzz
	set -e; for target in $(FUZZ_TARGETS); do \
		mkdir -p fuzz/corpus/$$target; \
		$(CARGO) +nightly fuzz run $$target fuzz/corpus/$$target fuzz/seeds/$$target -- -max_total_time=$(FUZZ_SECONDS) -max_len=262144 -rss_limit_mb=4096; \
	done

bench:
	tests/criu/install-packages lz4 zstd
	$(CARGO) bench --locked --bench bench -- $(BENCH)

install: build documents
	install -D -m 755 $(BINARY) $(DESTDIR)$(BINDIR)/criu-image-streamer
	[ ! -e $(DOCUMENTS)/criu-image-streamer.1 ] || install -D -m 644 $(DOCUMENTS)/criu-image-streamer.1 $(DESTDIR)$(PREFIX)/share/man/man1/criu-image-streamer.1
	install -D -m 644 $(DOCUMENTS)/criu-image-streamer.bash $(DESTDIR)$(PREFIX)/share/bash-completion/completions/criu-image-streamer
	install -D -m 644 $(DOCUMENTS)/_criu-image-streamer $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_criu-image-streamer
	install -D -m 644 $(DOCUMENTS)/criu-image-streamer.fish $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/criu-image-streamer.fish

uninstall:
	rm -f $(DESTDIR)$(BINDIR)/criu-image-streamer
	rm -f $(DESTDIR)$(PREFIX)/share/man/man1/criu-image-streamer.1
	rm -f $(DESTDIR)$(PREFIX)/share/bash-completion/completions/criu-image-streamer
	rm -f $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_criu-image-streamer
	rm -f $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/criu-image-streamer.fish

# Debian's zsh looks for a package's completions in vendor-completions, and its manual pages are compressed. The libc that is
# needed is the one whose newest symbols the program uses.
deb: ROOT = $(OUTPUT)/deb
deb: build
	rm -rf $(ROOT)
	$(MAKE) install DESTDIR=$(ROOT) PREFIX=/usr BINDIR=/usr/bin
	mv $(ROOT)/usr/share/zsh/site-functions $(ROOT)/usr/share/zsh/vendor-completions
	gzip -9n $(ROOT)/usr/share/man/man1/criu-image-streamer.1
	install -D -m 644 LICENSE $(ROOT)/usr/share/doc/criu-image-streamer/copyright
	install -D -m 644 -t $(ROOT)/usr/share/doc/criu-image-streamer/docs docs/*.md docs/*.svg
	install -m 644 -t $(ROOT)/usr/share/doc/criu-image-streamer README.md
	strip --strip-unneeded $(ROOT)/usr/bin/criu-image-streamer
	mkdir $(ROOT)/DEBIAN
	libc=$$(grep -ao 'GLIBC_[0-9][0-9.]*' $(ROOT)/usr/bin/criu-image-streamer | sed 's/GLIBC_//' | sort -Vu | tail -n 1) && \
	printf '%s\n' \
		'Package: criu-image-streamer' \
		'Version: $(VERSION)' \
		"Architecture: $$(dpkg --print-architecture)" \
		'Maintainer: criu-image-streamer developers <criu-image-streamer@localhost>' \
		"Installed-Size: $$(du -ks $(ROOT)/usr | cut -f 1)" \
		"Depends: libc6 (>= $$libc)" \
		'Recommends: criu' \
		'Suggests: bash, lz4' \
		'Section: admin' \
		'Priority: optional' \
		'Description: streams CRIU checkpoint images between CRIU and pipes' \
		' Captures the image that CRIU makes of a running process, and gives it back' \
		' to CRIU, without storing it on a disk in between: for checkpoints in object' \
		' stores, and for live migration.' \
		>$(ROOT)/DEBIAN/control
	dpkg-deb --root-owner-group --build $(ROOT) $(OUTPUT)/criu-image-streamer_$(VERSION)_$$(dpkg --print-architecture).deb

clean:
	$(CARGO) clean
	rm -f criu-image-streamer
