# What is done with the project from a shell. `make help` lists it.
#
# demo, test and bench first install what they need of Debian's packages (tests/setup.sh), which takes root the first
# time; they run buses, polkit and virtual machines of their own and touch nothing of the machine's.

# The QEMU to test with; without it, the one in PATH.
QEMU =
# Tests wait for QEMU and for each other's buses more than they compute: more of them at a time than a small machine has
# processors.
TEST_THREADS = 4
# Further arguments for the tests, such as a part of a test's name.
TEST_ARGS =

# How many backups are made in a row.
ENDURANCE_BACKUPS = 1000

# How often the power of a whole host is cut.
POWER_CUTS = 20

# How long each parser is fuzzed, and which.
FUZZ_SECONDS = 600
FUZZ_TARGETS = qmp document options manifest header configuration helper

DENY_VERSION = 0.20.2

# Where to install to. The bus and polkit read their policies below /usr only, so there is no /usr/local by default.
DESTDIR =
PREFIX = /usr
bindir = $(PREFIX)/bin
libexecdir = $(PREFIX)/libexec
datadir = $(PREFIX)/share
sysconfdir = /etc
unitdir = $(PREFIX)/lib/systemd/system
tmpfilesdir = $(PREFIX)/lib/tmpfiles.d

CARGO = cargo
CARGO_TARGET_DIR ?= target
# The directory with the programs to install.
BUILT = $(CARGO_TARGET_DIR)/release

# Tests mount things; in a mount namespace of their own, which only root can make, nothing stays if they are killed.
PRIVATELY = $(shell [ "$$(id -u)" = 0 ] && echo unshare --mount --)

# Where the package is made, and its version, if it is to be another than that of its changelog.
DEB_DIR = $(CARGO_TARGET_DIR)/debian
DEB_VERSION =

.PHONY: help setup build lint test test-system demo bench endurance power-cuts fuzz deb install clean

help:
	@echo "make demo       a real backup of a real virtual machine, from nothing"
	@echo "make lint       checks of shell scripts, man pages, and the licences and sources of dependencies"
	@echo "make test       all tests; QEMU=/path/to/qemu-system-x86_64 chooses the QEMU"
	@echo "make test-system"
	@echo "                the package in a booted Debian 13, with each of both buses; as root"
	@echo "make bench      how fast it is, and how fast others are"
	@echo "make endurance  1,000 backups in a row, many domains, and nothing at all: what the service holds and does; 12 minutes"
	@echo "make power-cuts a host in an emulator is killed 20 times, and its backups are restored; 20 minutes; as root"
	@echo "make fuzz       random input for what reads others' bytes; FUZZ_SECONDS=600 for each, FUZZ_TARGETS='qmp options'"
	@echo "make build      both programs, optimised"
	@echo "make deb        a Debian package, in target/debian"
	@echo "make install    DESTDIR= PREFIX=/usr"
	@echo "make clean      removes what was built"

setup:
	@tests/setup.sh

build:
	$(CARGO) build --release --locked

test bench endurance power-cuts: export BACKUPD_TEST_QEMU = $(QEMU)
# Root's shell does not always have the system's directories in PATH.
test bench endurance power-cuts: export PATH := $(PATH):/usr/sbin:/sbin

test: setup
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings
	$(PRIVATELY) $(CARGO) test --locked --no-fail-fast -- --test-threads=$(TEST_THREADS) $(TEST_ARGS)

# cargo-deny is compiled the first time, which takes a few minutes.
lint:
	@tests/setup.sh lint
	grep -rlE --exclude-dir=target '^#!.*\<(ba)?sh$$' .ci tests systemd | xargs shellcheck -x -P SCRIPTDIR -S warning
	@rm -rf '$(CARGO_TARGET_DIR)/man'
	$(CARGO) run --locked --quiet --bin backupctl -- man '$(CARGO_TARGET_DIR)/man'
	mandoc -T lint -W warning docs/man/*
	mandoc -T lint -W error '$(CARGO_TARGET_DIR)'/man/man*/*
	@$(CARGO) deny --version >/dev/null 2>&1 || $(CARGO) install --locked --version $(DENY_VERSION) --no-default-features cargo-deny
	$(CARGO) fetch --locked
	$(CARGO) deny --locked --offline --config .ci/deny.toml check licenses bans sources

# Takes root. The tree that it boots is kept in /var/cache/backupd-test-system (tests/system/run.sh); removing that makes a
# new one, with the newest packages of Debian 13.
test-system: deb
	@tests/setup.sh system
	$(call package,$(DEB_DIR)-next,$(shell sed -n '1s/.*(\(.*\)).*/\1/p' systemd/debian/changelog)+next)
	tests/system/run.sh $(DEB_DIR)/*.deb $(DEB_DIR)-next/*.deb

demo:
	@QEMU='$(QEMU)' CARGO='$(CARGO)' tests/demo.sh

# BACKUPD_BENCH_DIR=DIR chooses where its 12 GiB go, BACKUPD_BENCH_ROUNDS=N how often everything is measured. What the
# service logs at its default level is part of what it costs.
bench: export RUST_LOG = info
bench: setup
	$(PRIVATELY) $(CARGO) bench --locked --bench backup --bench night

# One after the other: what is measured is then not the others' work.
endurance: export BACKUPD_ENDURANCE = $(ENDURANCE_BACKUPS)
endurance: setup
	$(PRIVATELY) $(CARGO) test --locked --test endurance -- --nocapture --test-threads=1

# Prints the table of docs/reliability.md. BACKUPD_POWER_CUTS_SEED=N chooses other moments.
power-cuts: export BACKUPD_POWER_CUTS = $(POWER_CUTS)
power-cuts: setup
	$(PRIVATELY) $(CARGO) test --locked --test power_cuts -- --nocapture

# What is found beyond the committed corpus stays in the build directory; a finding is written to tests/fuzz/artifacts. The
# sanitizer needs a switch that a stable compiler has only for those who ask so. FUZZ_FLAGS are libFuzzer's.
FUZZ_FLAGS =
fuzz: export RUSTC_BOOTSTRAP = 1
fuzz:
	@$(CARGO) fuzz --version >/dev/null 2>&1 || $(CARGO) install --locked --version 0.13.2 cargo-fuzz
	@set -e; for target in $(FUZZ_TARGETS); do \
	    found=$(CARGO_TARGET_DIR)/fuzz/corpus/$$target; mkdir -p "$$found"; \
	    $(CARGO) fuzz run --fuzz-dir tests/fuzz --target-dir $(CARGO_TARGET_DIR)/fuzz "$$target" \
	        "$$found" tests/fuzz/corpus/$$target -- \
	        -max_total_time=$(FUZZ_SECONDS) -timeout=10 -rss_limit_mb=1024 -print_final_stats=1 $(FUZZ_FLAGS); \
	done

# A packager builds first and installs into a DESTDIR; root may have no cargo. So this builds only what isn't there.
$(BUILT)/backupd $(BUILT)/backupctl:
	$(CARGO) build --release --locked

fill = sed -e 's|@libexecdir@|$(libexecdir)|g' -e 's|@bindir@|$(bindir)|g'

install: $(BUILT)/backupd $(BUILT)/backupctl
	install -D -m 755 $(BUILT)/backupd '$(DESTDIR)$(libexecdir)/backupd'
	install -D -m 755 $(BUILT)/backupctl '$(DESTDIR)$(bindir)/backupctl'
	install -D -m 644 -t '$(DESTDIR)$(datadir)/dbus-1/system.d' dbus/org.example.Backup1.conf
	install -D -m 644 -t '$(DESTDIR)$(datadir)/dbus-1/interfaces' dbus/*.xml
	install -D -m 644 -t '$(DESTDIR)$(datadir)/polkit-1/actions' polkit/org.example.backup1.policy
	install -d '$(DESTDIR)$(datadir)/dbus-1/system-services' '$(DESTDIR)$(unitdir)'
	$(fill) dbus/org.example.Backup1.service \
	    > '$(DESTDIR)$(datadir)/dbus-1/system-services/org.example.Backup1.service'
	$(fill) systemd/backupd.service > '$(DESTDIR)$(unitdir)/backupd.service'
	$(fill) 'systemd/backupd-backup@.service' > '$(DESTDIR)$(unitdir)/backupd-backup@.service'
	$(fill) 'systemd/backupd-look@.service' > '$(DESTDIR)$(unitdir)/backupd-look@.service'
	install -D -m 644 -t '$(DESTDIR)$(unitdir)' systemd/backupd-look.socket 'systemd/backupd-backup@.timer'
	install -D -m 644 systemd/backupd.tmpfiles '$(DESTDIR)$(tmpfilesdir)/backupd.conf'
	install -d '$(DESTDIR)$(sysconfdir)/backupd/domains.d'
	[ -e '$(DESTDIR)$(sysconfdir)/backupd/backupd.toml' ] || \
	    install -m 644 docs/backupd.toml '$(DESTDIR)$(sysconfdir)/backupd/backupd.toml'
	install -D -m 644 -t '$(DESTDIR)$(datadir)/man/man8' docs/man/backupd.8
	install -D -m 644 -t '$(DESTDIR)$(datadir)/man/man5' docs/man/backupd.toml.5
	install -d '$(DESTDIR)$(datadir)/bash-completion/completions' \
	    '$(DESTDIR)$(datadir)/zsh/vendor-completions' '$(DESTDIR)$(datadir)/fish/vendor_completions.d'
	$(BUILT)/backupctl man '$(DESTDIR)$(datadir)/man'
	$(BUILT)/backupctl completions bash > '$(DESTDIR)$(datadir)/bash-completion/completions/backupctl'
	$(BUILT)/backupctl completions zsh > '$(DESTDIR)$(datadir)/zsh/vendor-completions/_backupctl'
	$(BUILT)/backupctl completions fish > '$(DESTDIR)$(datadir)/fish/vendor_completions.d/backupctl.fish'

# Debian's own tools make the package, from a copy of what they want to find beside them.
deb:
	@tests/setup.sh package
	$(CARGO) build --release --locked
	$(call package,$(DEB_DIR),$(DEB_VERSION))

# DIRECTORY, VERSION or nothing for that of the changelog
define package
	rm -rf '$(1)/build' '$(1)'/backupd_*
	mkdir -p '$(1)/build'
	cp -r systemd/debian README.md docs '$(1)/build/'
	[ -z '$(2)' ] || sed -i '1s|(.*)|($(2))|' '$(1)/build/debian/changelog'
	cd '$(1)/build' && SOURCE='$(CURDIR)' BUILT='$(abspath $(BUILT))' \
	    dpkg-buildpackage --build=binary --no-sign --no-pre-clean >../build.log 2>&1 || { cat ../build.log; exit 1; }
	rm -rf '$(1)/build'
	@ls '$(1)'/*.deb
endef

clean:
	$(CARGO) clean
