# eventstore on the official image of PostgreSQL.
#
#   docker build -t eventstore .                             PostgreSQL 17
#   docker build -t eventstore:15 --build-arg PG_MAJOR=15 .  another: 15 to 18
#   docker run -e POSTGRES_PASSWORD=secret -p 5432:5432 eventstore
#
# The library is preloaded, and the extension created in the database that the
# image makes at its first start; in others by CREATE EXTENSION eventstore.
ARG PG_MAJOR=17
ARG DEBIAN=bookworm

FROM postgres:${PG_MAJOR}-${DEBIAN} AS build
ARG PG_MAJOR
RUN apt-get update \
	&& apt-get install -y --no-install-recommends \
		gcc libc6-dev librdkafka-dev make "postgresql-server-dev-${PG_MAJOR}" \
	&& rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY Makefile eventstore.control eventstore--*--*.sq[l] ./
COPY src src
RUN make -j"$(nproc)" PG_CONFIG="/usr/lib/postgresql/${PG_MAJOR}/bin/pg_config" \
	&& make install DESTDIR=/out PG_CONFIG="/usr/lib/postgresql/${PG_MAJOR}/bin/pg_config"

FROM postgres:${PG_MAJOR}-${DEBIAN}
RUN apt-get update \
	&& apt-get install -y --no-install-recommends librdkafka1 \
	&& rm -rf /var/lib/apt/lists/* \
	&& echo "shared_preload_libraries = 'eventstore'" >>/usr/share/postgresql/postgresql.conf.sample \
	&& echo "CREATE EXTENSION eventstore;" >/docker-entrypoint-initdb.d/eventstore.sql
COPY --from=build /out/ /
