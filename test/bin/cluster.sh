# shellcheck shell=bash
# A temporary PostgreSQL cluster with this work tree's eventstore in it; sourced
# by test/run, test/bin/psql and demo/run.
#
#   begin_work               a private folder, removed at exit with all that runs in it
#   stage_programs           PostgreSQL's programs, in that folder
#   stage_postgres           the same with the extension
#   start_cluster SETTING…   initdb and start; PGHOST, PGPORT, PGUSER point to it
#   as_server COMMAND…       run as the user who may run a server
#
# Nothing of the machine's own PostgreSQL is touched, nor is the extension
# installed into it: PostgreSQL finds its libraries and scripts relative to
# where its programs lie.  So a copy of the programs, with links to everything
# else and "make install DESTDIR" on top, is an installation of its own; two
# work trees can be tested at once, and no one needs to be root.
#
# PostgreSQL refuses to run as root.  For root all servers, and the tests that
# start servers, run as an unprivileged user, and all they write lies in $run.

set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
logs=$repo/build/logs
work=
run=
server_user=
# What runs at exit; one who sets another calls clean_work, or end_work, there.
at_exit=end_work
PG_CONFIG=${PG_CONFIG:-pg_config}

# The caller's connection settings and make's own must not reach the children.
unset PGHOST PGHOSTADDR PGPORT PGUSER PGDATABASE PGPASSWORD PGPASSFILE PGSERVICE \
	PGSERVICEFILE PGOPTIONS PGDATA PGSSLMODE PGTZ PGDATESTYLE PGCLIENTENCODING \
	MAKEFLAGS MAKELEVEL MFLAGS

say()
{
	printf '%s\n' "==> $*"
}

die()
{
	printf '%s\n' "$*" >&2
	exit 1
}

choose_server_user()
{
	local user
	[ "$EUID" -eq 0 ] || return 0
	for user in postgres nobody; do
		if id "$user" >/dev/null 2>&1; then
			server_user=$user
			return
		fi
	done
	die "root cannot run PostgreSQL, and there is no user postgres or nobody to run it as"
}

# Replaces the shell.  In $run, because the caller's folder may be closed to that user.
become_server()
{
	cd "$run"
	export HOME=$run
	if [ -n "$server_user" ]; then
		exec setpriv --reuid="$server_user" --regid="$(id -g "$server_user")" --clear-groups "$@"
	fi
	exec "$@"
}

as_server()
{
	(become_server "$@")
}

# Under /tmp whatever TMPDIR says: a socket's path must be shorter than 108 bytes.
begin_work()
{
	choose_server_user
	work=$(mktemp -d /tmp/eventstore.XXXXXX)
	trap '"$at_exit"' EXIT
	trap 'exit 130' INT
	trap 'exit 143' TERM HUP
	chmod 755 "$work"
	run=$work/run
	mkdir "$run"
	[ -z "$server_user" ] || chown "$server_user" "$run"
}

# Stops every server whose data folder lies in the given folder of ours, and
# nothing else.
stop_servers()
{
	local pid_file
	[ -n "${bindir:-}" ] || return 0
	while IFS= read -r pid_file; do
		as_server "$bindir/pg_ctl" stop --silent --mode=immediate \
			--pgdata="$(dirname "$pid_file")" >/dev/null 2>&1 || true
	done < <(find "$1" -name postmaster.pid 2>/dev/null)
}

clean_work()
{
	trap '' INT TERM HUP
	[ -n "$work" ] || return 0
	stop_servers "$run"
	rm -rf "$work"
}

# end_work [STATUS]
end_work()
{
	local status=${1:-$?}
	trap - EXIT
	if [ "$status" -ne 0 ] && [ -f "$run/server.log" ]; then
		mkdir -p "$logs"
		cp --no-preserve=ownership "$run/server.log" "$logs/"
		say "the server's log is kept in ${logs#"$repo"/}/server.log"
	fi
	clean_work
	exit "$status"
}

link_tree()
{
	mkdir -p "$stage$1"
	cp -rs "$1/." "$stage$1/"
}

# Only PostgreSQL's own programs: on some systems they share /usr/bin with all others.
copy_programs()
{
	local from=$1 program
	mkdir -p "$stage$from"
	for program in "$from"/pg_* "$from"/{postgres,psql,initdb,pgbench,createdb,dropdb} \
		"$from"/{createuser,dropuser,vacuumdb,reindexdb,clusterdb}; do
		[ ! -f "$program" ] || cp -L "$program" "$stage$from/"
	done
}

# Where SERVER_UNDER is a command, that is what servers run under.  Not what the
# program is asked in passing, nor initdb's work, which are PostgreSQL's own.
# pg_ctl would restart the very program that ran.
wrap_server()
{
	local bin=$1
	[ -n "${SERVER_UNDER:-}" ] || return 0
	mv "$bin/postgres" "$bin/pg_server"
	mv "$bin/pg_ctl" "$bin/pg_ctl_unwrapped"
	cat >"$bin/postgres" <<-END
		#!/bin/sh
		case \${1:-} in -V | -C | --*) exec "\${0%/*}/pg_server" "\$@" ;; esac
		exec $SERVER_UNDER "\${0%/*}/pg_server" "\$@"
	END
	cat >"$bin/pg_ctl" <<-END
		#!/bin/sh
		case " \$* " in *" restart "*) set -- "\$@" -p "$bin/postgres" ;; esac
		exec "$bin/pg_ctl_unwrapped" "\$@"
	END
	chmod +x "$bin/postgres" "$bin/pg_ctl"
}

# build TARGET...: one at a time in a work tree; its objects are shared by all who call make.
build()
{
	mkdir -p "$logs"
	if ! flock "$repo/build/.lock" \
		make -C "$repo" -j"$(nproc)" PG_CONFIG="$PG_CONFIG" DESTDIR="$stage" "$@" \
		>"$logs/build.log" 2>&1; then
		tail -n 30 "$logs/build.log" >&2
		printf '%s\n' "The build failed; all of it is in ${logs#"$repo"/}/build.log" >&2
		return 1
	fi
}

# Without the extension.
stage_programs()
{
	local programs sharedir
	# The copy that comes first in the PATH from here on knows of no headers.
	PG_CONFIG=$(command -v "$PG_CONFIG")
	programs=$("$PG_CONFIG" --bindir)
	sharedir=$("$PG_CONFIG" --sharedir)
	pkglibdir=$("$PG_CONFIG" --pkglibdir)
	stage=${1:-$work/stage}
	copy_programs "$programs"
	link_tree "$pkglibdir"
	link_tree "$sharedir"
	# The machine's own eventstore, if there is one, is not the one under test.
	rm -f "$stage$pkglibdir"/eventstore.so "$stage$sharedir"/extension/eventstore[.-]*
	bindir=$stage$programs
	wrap_server "$bindir"
	export PATH=$bindir:$PATH
}

# stage_postgres [FOLDER]
stage_postgres()
{
	stage_programs "$@"
	build install
}

write_settings()
{
	printf '%s\n' \
		"listen_addresses = ''" \
		"unix_socket_directories = '$run/socket'" \
		"port = $PGPORT" \
		"shared_preload_libraries = 'eventstore'" \
		"max_worker_processes = 16" \
		"$@"
}

# Arguments are further lines of postgresql.conf; a later one overrides.
start_cluster()
{
	local server_log=$run/server.log
	export PGHOST=$run/socket PGPORT=5432 PGUSER=postgres PGDATABASE=postgres
	as_server mkdir "$run/socket"
	as_server "$bindir/initdb" --pgdata="$run/data" --username=postgres --auth=trust \
		--encoding=UTF8 --no-locale --no-sync >"$work/initdb.log" 2>&1 || {
		tail -n 20 "$work/initdb.log" >&2
		return 1
	}
	write_settings "$@" | as_server tee -a "$run/data/postgresql.conf" >/dev/null
	as_server "$bindir/pg_ctl" start --silent --wait --timeout=180 \
		--pgdata="$run/data" --log="$server_log" >/dev/null || {
		tail -n 20 "$server_log" >&2
		printf '%s\n' "the temporary server did not start" >&2
		return 1
	}
}
