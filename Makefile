# Builds, installs and tests eventstore.
#
#   make, make install, make installcheck, PG_CONFIG=...   as with any PGXS extension
#   make demo    a temporary server, a year of flights, questions answered by SQL
#   make test    every test, on temporary servers
#   make psql    a psql on a temporary server with the extension created
#   make dist    the release in build/dist: a zip for PGXN, a tarball; what is committed
#
# These need no pg_config to be there: they install what is missing
# (as root; else they print the line to run) and call make again.  So nothing
# above the "ifeq" below may depend on PostgreSQL.

EXTENSION = eventstore
EXTVERSION = 0.1.0

# The install script is these parts joined, in the order in which a user meets
# them.  Each part stands beside the C that it exposes.
SQL_PARTS = \
	src/schema.sql \
	src/collection/label_index.sql \
	src/collection/collection.sql \
	src/collection/append.sql \
	src/feed/read.sql \
	src/feed/live.sql \
	src/feed/subscription.sql \
	src/store/store.sql \
	src/store/capture.sql \
	src/kafka/connection.sql \
	src/kafka/source.sql \
	src/kafka/sink.sql \
	src/kafka/views.sql \
	src/stats/monitor.sql \
	src/stats/metrics.sql

INSTALL_SQL = $(EXTENSION)--$(EXTVERSION).sql

MODULE_big = $(EXTENSION)
OBJS = $(patsubst %.c,%.o,$(sort $(wildcard src/*.c src/*/*.c)))
HEADER_DEPENDENCIES = $(OBJS:.o=.d)

DATA = $(wildcard $(EXTENSION)--*--*.sql)
DATA_built = $(INSTALL_SQL)
EXTRA_CLEAN = $(HEADER_DEPENDENCIES) $(INSTALL_SQL).tmp $(BUILT_FOR) $(KAFKA_PROGRAMS) build/logs

SHLIB_LINK += -lrdkafka

PG_CPPFLAGS = -I$(srcdir)/src -MMD -MP
# -Wextra as far as PostgreSQL's own headers pass it.
PG_CFLAGS = -Wall -Wextra -Wno-unused-parameter -Wno-sign-compare -Wno-missing-field-initializers

# installcheck runs against the server that PGHOST and PGPORT name; it must have
# shared_preload_libraries = 'eventstore'.
REGRESS = $(patsubst sql/%.sql,%,$(sort $(wildcard sql/*.sql)))
REGRESS_OPTS = --load-extension=$(EXTENSION)
ISOLATION = $(patsubst test/isolation/specs/%.spec,%,$(sort $(wildcard test/isolation/specs/*.spec)))
ISOLATION_OPTS = --inputdir=test/isolation --load-extension=$(EXTENSION)

# Beside the tests of Kafka: a mock broker, and a client.  Not installed.
KAFKA_PROGRAMS = test/kafka/mock_broker test/kafka/client

# JIT cannot inline anything of use from this module, and making the bitcode
# needs the very clang that PostgreSQL was built with.
ifneq ($(origin with_llvm),command line)
override with_llvm = no
endif

PG_CONFIG ?= pg_config
PGXS := $(shell $(PG_CONFIG) --pgxs 2>/dev/null)

# What the objects were compiled for.  They are compiled anew when it changes, so
# that one work tree serves several PostgreSQLs in turn.
BUILT_FOR = build/built-for

ifneq ($(wildcard $(PGXS)),)
include $(PGXS)

$(OBJS): $(BUILT_FOR)
$(BUILT_FOR): FORCE
	@mkdir -p $(@D)
	@echo '$(bindir) $(VERSION) $(CC) $(CPPFLAGS) $(CFLAGS)' >$@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

.PHONY: FORCE
FORCE:
else
.PHONY: all install uninstall installcheck
all install uninstall installcheck:
	@echo "make $@: $(PG_CONFIG) names no PostgreSQL to build against." >&2
	@echo "Set PG_CONFIG=/path/to/pg_config, or install what is missing:" >&2
	@test/bin/prerequisites --print build >&2
	@false

.PHONY: clean
clean:
	rm -rf $(OBJS) $(DATA_built) $(EXTRA_CLEAN) $(EXTENSION).so
endif

-include $(HEADER_DEPENDENCIES)

# A part that is missing in the list would be missed by users only, so stop here.
UNLISTED_PARTS = $(filter-out $(SQL_PARTS),$(wildcard src/*.sql src/*/*.sql))

$(INSTALL_SQL): $(SQL_PARTS) Makefile
	$(if $(UNLISTED_PARTS),$(error not in SQL_PARTS: $(UNLISTED_PARTS)))
	@echo "joining $(words $(SQL_PARTS)) parts into $@"
	@{ printf '%s\n' '\echo Use "CREATE EXTENSION $(EXTENSION)" to load this file. \quit'; \
	   for part in $(SQL_PARTS); do printf '\n-- %s\n\n' "$$part"; cat "$$part"; done; \
	 } >$@.tmp
	@mv $@.tmp $@

$(KAFKA_PROGRAMS): %: %.c
	$(CC) -std=gnu11 -D_GNU_SOURCE -O2 -Wall -Wextra -o $@ $< -lrdkafka -lpthread

# The same bytes each time.
DIST = $(EXTENSION)-$(EXTVERSION)

.PHONY: dist
dist:
	@mkdir -p build/dist
	TZ=UTC git archive --format=zip --prefix=$(DIST)/ --output=build/dist/$(DIST).zip HEAD
	git archive --format=tar --prefix=$(DIST)/ HEAD | gzip -9n >build/dist/$(DIST).tar.gz

.PHONY: demo test psql
demo:
	@PG_CONFIG='$(PG_CONFIG)' demo/run

# TESTS names what to run, files or folders; default: everything.
# make test TESTS="sql/append.sql test/tap"
test:
	@PG_CONFIG='$(PG_CONFIG)' test/run $(TESTS)

# BENCH names benchmarks and options, see bench/run; then pictures of all results.
.PHONY: bench
bench:
	@PG_CONFIG='$(PG_CONFIG)' bench/run $(BENCH)
	@build/bench/venv/bin/python bench/plot.py

# Everything together for SECONDS, and hostile calls and queries for as long; all are in "make test", in short.
SECONDS = 3600
.PHONY: soak fuzz sqlsmith
soak fuzz sqlsmith:
	@PG_CONFIG='$(PG_CONFIG)' EVENTSTORE_SOAK_SECONDS=$(SECONDS) EVENTSTORE_FUZZ_SECONDS=$(SECONDS) \
		TEST_FILE_LIMIT=$$(($(SECONDS) + 900)) test/run test/tap/$@.pl

psql:
	@PG_CONFIG='$(PG_CONFIG)' test/bin/psql
